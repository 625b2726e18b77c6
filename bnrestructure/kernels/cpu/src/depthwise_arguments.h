// What crosses the C boundary for a fused depthwise convolution. depthwise.py packs these structures field by field; a
// field added here is added there. Every field is eight bytes wide, pitches and strides are in elements, a null pointer
// means "not there", and element types are numbered as in activation.h (0 float, 1 bf16).
#pragma once

#include <cstdint>

namespace bnr::depthwise {

// Shared by forward and backward: y = conv(act((x - mean) * scale + beta) * gate, weight), one filter a channel.
struct Problem {
    int64_t batch, channels, in_height, in_width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    int64_t threads;
    int64_t x_element, y_element, weight_element;  // of x and dx; of y and dy; of the weight and its gradient
    const void* x;                                 // [N, H, W, C]
    int64_t x_pitch;
    const float *mean, *scale, *beta;  // [C], all or none
    const float* gate;                 // [N, C]
    int64_t activation;                // as activation.h numbers them
    double slope;                      // of a leaky ReLU
    const void* weight;                // [C, 1, kernel_h, kernel_w]
    int64_t weight_strides[3];         // of the channel, kernel row and kernel column
};

struct ForwardArguments {
    Problem problem;
    const float* bias;  // [C]
    void* y;            // [N, H_out, W_out, C]
    int64_t y_pitch;
    float *y_mean, *y_var;  // [C], both or none: biased statistics of y as stored
};

struct BackwardArguments {
    Problem problem;
    const void* dy;  // P of the backward edge
    int64_t dy_pitch;
    const float *s, *a, *b;  // [C]: dY = s * P + a * (y - y_mean) + b; s may be null, a and b are both or none
    const void* y;           // y and y_mean are there when a is
    int64_t y_pitch;
    const float* y_mean;
    void* dx;  // null: no input gradient, no sums
    int64_t dx_pitch;
    int64_t accumulate;      // add to dx
    float *sum_p, *sum_px;   // [C], both or none
    float* gate_gradient;    // [N, C], with a gate
    void* weight_gradient;   // null: none
    int64_t weight_gradient_strides[3];
    float* bias_gradient;  // [C]
};

}  // namespace bnr::depthwise
