// What crosses the C boundary. structures.py declares the same structures; layout.cpp tells it these ones' fields, and a library whose
// fields differ is not used. Every field is eight bytes wide. Pitches and strides are in elements, element types and activations are numbered as
// in activation.h, and a null pointer means "not there". memory.py has held every pointer against its tensor's memory.
#pragma once

#include <cstdint>

namespace bnr {

// A convolution, dense or depthwise: y = conv(act((x - mean) * scale + beta) * gate, weight). Numbers first, then addresses.
struct Problem {
    int64_t batch, in_channels, in_height, in_width;
    int64_t out_channels, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
    int64_t x_element;       // of x and dx
    int64_t y_element;       // of y and dy; a dense convolution's x is of the same
    int64_t weight_element;  // of the weight and its gradient
    int64_t threads;
    int64_t activation;
    double slope;               // of a leaky ReLU
    int64_t weight_strides[4];
    int64_t x_pitch;
    const void* x;              // [N, H, W, C_in]
    const void* weight;         // [C_out, C_in / groups, kernel_h, kernel_w]
    const float *mean, *scale, *beta;   // [C_in], all or none
    const float* gate;                  // [N, C_in]

    bool bfloat16() const { return y_element != 0; }
};

// The residual join whose sum a convolution reads: x = act(ty(y) * gate + tr(r)). With one, Problem's own transform is the identity.
struct Join {
    const void* y;                  // null: there is none
    int64_t y_pitch;
    const float *y_mean, *y_scale, *y_beta;   // [C_in], all or none
    const float* gate;              // [N, C_in], or null
    int64_t gate_pitch, image_pixels;   // C_in and H * W
    const void* r;
    int64_t r_pitch;
    const float *r_mean, *r_scale, *r_beta;
    int64_t activation;
    double slope;
};

struct ForwardArguments {
    Problem problem;
    const float* bias;              // [C_out]
    void* y;                        // [N, H_out, W_out, C_out]
    int64_t y_pitch;
    float *y_mean, *y_var;          // [C_out], both or none: biased statistics of y as stored
    Join join;                      // x is written first; for a 1x1 kernel without stride and padding
};

struct BackwardArguments {
    Problem problem;
    const void* dy;                 // P of the backward edge
    int64_t dy_pitch;
    const float *s, *a, *b;         // [C_out]: dY = s * P + a * (y - y_mean) + b; s may be null, a and b are both or none
    const void* y;                  // y and y_mean are there when a is
    int64_t y_pitch;
    const float* y_mean;
    void* dx;                       // null: no input gradient, no sums
    int64_t dx_pitch;
    int64_t accumulate;             // add to dx
    float *sum_p, *sum_px;          // [C_in], both or none
    float* sum_pr;                  // [C_in], with a join: sum of G * (r - join.r_mean)
    float* gate_gradient;           // [N, C_in], with a gate
    void* weight_gradient;          // null: none
    int64_t weight_gradient_strides[4];
    float* bias_gradient;           // [C_out]
    double gradient_factor;         // what dY is multiplied by before it is rounded to bfloat16; results are divided by it
    Join join;                      // dx takes G, the gradient at the sum; sum_p and sum_px are those of G and G * (y - join.y_mean)
};

// A sweep over activations of `images` images of height x width pixels. Each reads and writes what its comment names.
struct SweepArguments {
    int64_t element;                // of every activation
    int64_t images, height, width, channels;
    int64_t threads;
    int64_t activation;
    double slope;
    const void* x;                  // what is transformed: z = act((x - mean) * scale + beta) * gate + r
    int64_t x_pitch;
    const float *mean, *scale, *beta;     // [C], all or none
    const float* gate;              // [N, C]
    const void* r;                  // or null; a join's other operand: z = act(tx(x) * gate + tr(r))
    int64_t r_pitch;
    const float *r_mean, *r_scale, *r_beta;
    void* z;                        // written forward; read backward where statistics were taken of it
    int64_t z_pitch;
    float *z_mean, *z_var;          // [C]: biased statistics of z as stored
    float* pooled;                  // [N, C]: the average over an image, or its gradient
    const void* dz;                 // the gradient at z is gradient_factor * dz, and what comes with statistics: a * (z - z_mean) + b
    int64_t dz_pitch;
    double gradient_factor;
    const float *s, *a, *b;         // [C]: a and b are both or none; s multiplies dz where z is a convolution's output
    void* dx;
    int64_t dx_pitch;
    int64_t accumulate;             // add to dx
    float *sum_p, *sum_px, *sum_pr; // [C], or null
    float* gate_gradient;           // [N, C]
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, out_height, out_width;   // a pool's window, and z's size
    uint8_t* index;                 // of z's size: where in its window each maximum was
    int64_t index_pitch;
};

// The step between the halves of a batch norm, for each channel.
struct FinalizeArguments {
    int64_t channels;
    const float *mean, *var;        // [C]
    double unbias;                  // count / (count - 1)
    double momentum, eps;
    const void *weight, *bias;      // [C], or null; of the elements named here
    int64_t weight_element, bias_element;
    void *running_mean, *running_var;
    int64_t running_mean_element, running_var_element;
    float *rstd, *scale, *beta;     // [C]
    const float *dscale, *dbeta;    // [C]
    const float *of_mean, *of_var;  // [C], or null: gradients that other readers have made
    float *dmean, *dvar, *dweight;  // [C]
};

}  // namespace bnr
