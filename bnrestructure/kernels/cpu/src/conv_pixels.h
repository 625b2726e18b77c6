// What happens to the pixels of a tile before and after the matrix products: the two edge formulas and their like.
//
// Every function works on a run of `pixels` pixels with a pitch between them, on `channels` channels from the given
// pointers on. T is the tensors' element type; Out is what the products read: float, rounded to T, or bf16.
#pragma once

#include <cstdint>

#include "activation.h"
#include "arguments.h"
#include "gemm.h"
#include "join_pixels.h"

namespace bnr::conv {

// z = act((x - mean) * scale + beta) * gate, with every vector at the run's first channel.
struct InputTransform {
    const float *mean, *scale, *beta;   // null: no affine part
    Activation act;
    const float* gate;                  // of the run's image; null: 1

    bool is_identity() const { return !mean && act.kind == Act::identity && !gate; }
};
InputTransform transform_at(const Problem& p, int64_t image, int64_t channel);

// dY = s * P + a * (y - mean) + b
struct OutputEdge {
    const float *s, *a, *b, *mean;
};

template <class T, class Out>
void transform_pixels(const T* x, int64_t ldx, int64_t pixels, int64_t channels, const InputTransform& t, Out* z,
                      int64_t ldz);

// d = factor * dY
template <class T, class Out>
void output_gradient_pixels(const T* p, int64_t ldp, const T* y, int64_t ldy, int64_t pixels, int64_t channels,
                            const OutputEdge& edge, float factor, Out* d, int64_t ldd);

// sum[c] += the sum of dY over the pixels, in fp32. `sum` has padded(channels) floats.
template <class T>
void add_output_gradient(const T* p, int64_t ldp, const T* y, int64_t ldy, int64_t pixels, int64_t channels,
                         const OutputEdge& edge, float* sum);

// From the gradient at z, factor * g, to dx = scale * P (added to dx with `accumulate`); sum_p += P, sum_px += P * (x - mean), given
// where there is an affine part. No gate.
template <class T>
void input_gradient_pixels(const float* g, int64_t ldg, const T* x, int64_t ldx, int64_t pixels, int64_t channels,
                           const InputTransform& t, float factor, T* dx, int64_t lddx, bool accumulate, float* sum_p,
                           float* sum_px);

// With a gate: dx = factor * g * gate, and sum_gate += factor * g * act(...).
template <class T>
void gated_gradient_pixels(const float* g, int64_t ldg, const T* x, int64_t ldx, int64_t pixels, int64_t channels,
                           const InputTransform& t, float factor, T* dx, int64_t lddx, bool accumulate, float* sum_gate);

// y = c + bias; c and y may be the same memory, bias may be null.
template <class T>
void finish_output_pixels(const float* c, int64_t ldc, int64_t pixels, int64_t channels, const float* bias, T* y,
                          int64_t ldy);

// The same, and what add_moments() would add for y as stored.
template <class T>
void finish_output_pixels(const float* c, int64_t ldc, int64_t pixels, int64_t channels, const float* bias, T* y, int64_t ldy,
                          const float* shift, float* sum, float* square);

}  // namespace bnr::conv
