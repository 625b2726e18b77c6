// Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308): 3x3 convolutions of stride 1 in 16 products per
// 2x2 outputs instead of 36. In one dimension, with g the kernel, d the input, y the output and e the output's gradient:
//
//   y = A' (G g . B' d)         B' d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)        G g = (g0, (g0 + g1 + g2)/2, (g0 - g1 + g2)/2, g2)
//   dg = G' (A e . B' d)        A' m = (m0 + m1 + m2, m1 - m2 - m3)                A e = (e0, e0 + e1, e0 - e1, -e1)
//
// and in two dimensions the same along rows and columns. All entries but G's are 0, 1 and -1, so that in float32 it is about as
// exact as the direct sum; bfloat16 would round the transformed values a second time, and is not offered.
#pragma once

#include <cstring>

#include "conv_geometry.h"
#include "conv_pack.h"
#include "parallel.h"

namespace bnr::winograd {

constexpr int64_t kComponents = 16;

// Transformed pixels (tiles of 2x2 outputs): component i of channel c of pixel t is at data[i * step + t * pitch + c].
struct Components {
    Components(Scratch& scratch, int64_t pixels, int64_t channels);

    float* of(int64_t component) const { return data + component * step; }

    int64_t pitch, step;
    float* data;
};

// B' d B for `tiles` adjacent tiles: `rows` are the four rows of d, ld floats from pixel to pixel, and hold padded(channels).
void transform_input(const float* const rows[4], int64_t ld, int64_t tiles, int64_t channels, const Components& to, int64_t pixel);

// A e A' likewise, from two rows.
void transform_gradient(const float* const rows[2], int64_t ld, int64_t tiles, int64_t channels, const Components& to,
                        int64_t pixel);

// A' m A likewise, to two rows.
void transform_output(const Components& from, int64_t pixel, int64_t tiles, int64_t channels, float* const rows[2], int64_t ld);

// G g G' of a float32 weight as panels of 16 taps; with `transposed` of the weight that the input gradient is a convolution with.
// The panels are in `scratch`.
conv::PackedWeight transform_weight(const Problem& p, const conv::Grouping& g, bool transposed, Scratch& scratch);

// G' s G: component i of output n and input c of its group is at part[(i * outputs + n) * row_pitch + c], summed over the parts; tap
// t goes to to[n * to_pitch + t * inputs + c].
void transform_weight_gradient(const std::vector<float*>& parts, int64_t outputs, int64_t inputs, int64_t row_pitch, float* to,
                               int64_t to_pitch, int64_t threads);

}  // namespace bnr::winograd
