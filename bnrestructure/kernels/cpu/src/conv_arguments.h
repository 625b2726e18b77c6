// What crosses the C boundary for a dense fused convolution. convolution.py packs these structures field by field; a
// field added here is added there. Every field is eight bytes wide, pitches and strides are in elements, and a null
// pointer means "not there".
#pragma once

#include <cstdint>

namespace bnr::conv {

// Shared by forward and backward: y = conv(act((x - mean) * scale + beta) * gate, weight).
struct Problem {
    int64_t batch, in_channels, in_height, in_width;
    int64_t out_channels, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
    int64_t bfloat16;          // x, y, dy and dx are bfloat16, else float32
    int64_t weight_bfloat16;   // the weight and its gradient are bfloat16, else float32
    int64_t threads;
    const void* x;                  // [N, H, W, C_in], pixel pitch x_pitch
    int64_t x_pitch;
    const float *mean, *scale, *beta;   // [C_in], all or none
    const float* gate;                  // [N, C_in]
    int64_t activation;            // as activation.h numbers them
    double slope;                       // of a leaky ReLU
    const void* weight;                 // [C_out, C_in / groups, kernel_h, kernel_w]
    int64_t weight_strides[4];
};

// The residual join whose sum a convolution reads: x = act(ty(y) + tr(r)). With one, Problem's own transform is the identity.
struct Join {
    const void* y;                  // null: there is none
    int64_t y_pitch;
    const float *y_mean, *y_scale, *y_beta;   // [C_in], all or none
    const void* r;
    int64_t r_pitch;
    const float *r_mean, *r_scale, *r_beta;
    int64_t activation;
    double slope;
};

struct ForwardArguments {
    Problem problem;
    const float* bias;              // [C_out]
    void* y;                        // [N, H_out, W_out, C_out], pixel pitch y_pitch
    int64_t y_pitch;
    float *y_mean, *y_var;          // [C_out], both or none: biased statistics of y as stored
    Join join;                      // x is written first; for a 1x1 kernel without stride and padding
};

struct BackwardArguments {
    Problem problem;
    const void* dy;                 // P of the backward edge, pixel pitch dy_pitch
    int64_t dy_pitch;
    const float *s, *a, *b;         // dY = s * P + a * (y - y_mean) + b; s may be null, a and b are both or none
    const void* y;
    int64_t y_pitch;
    const float* y_mean;
    void* dx;                       // null: no input gradient, no sums
    int64_t dx_pitch;
    int64_t accumulate;        // add to dx
    float *sum_p, *sum_px;          // [C_in], both or none
    float* gate_gradient;           // [N, C_in], with a gate
    void* weight_gradient;          // null: none
    int64_t weight_gradient_strides[4];
    float* bias_gradient;           // [C_out]
    double gradient_factor;         // what dY is multiplied by before it is rounded to bfloat16; results are divided by it
    Join join;                      // dx takes G, the gradient at the sum; sum_p and sum_px are those of G and G * (y - join.y_mean)
    float* sum_pr;                  // [C_in], with a join: sum of G * (r - join.r_mean)
};

}  // namespace bnr::conv
