// The residual join, z = act(ty(y) + tr(r)), for whatever carries it: a sweep of its own, or a convolution's tiles.
//
// Every function works on `pixels` pixels from `pixel` on; `channels` are all of them, or those from the given one on. T is the tensors'
// element type.
#pragma once

#include "arguments.h"
#include "statistics.h"

namespace bnr {

// z, and with `moments` what add_moments() would add for z as stored.
template <class T>
void join_pixels(const Join& join, int64_t pixel, int64_t pixels, int64_t channels, T* z, int64_t ldz, Moments* moments = nullptr);

struct JoinSums {
    float *p, *py, *pr;
};

// What the gradient at z gains where statistics of z were taken: a * (z - mean) + b.
struct StatisticsEdge {
    const float *a, *b, *mean;
    const void* z;
    int64_t ldz;
};

// From the gradient at z, factor * g (of any memory; added to what dx holds with `accumulate`) and the edge's share, to G, what both operands
// share, in dx; sum_p += G, sum_py += G * (y - y_mean), sum_pr += G * (r - r_mean). With an edge G is stored so that it is kept on average.
template <class T, class Gradient>
void join_gradient_pixels(const Gradient* g, int64_t ldg, const Join& join, int64_t pixel, int64_t channel, int64_t pixels,
                          int64_t channels, float factor, T* dx, int64_t lddx, bool accumulate, const JoinSums& sums,
                          const StatisticsEdge* edge = nullptr);

}  // namespace bnr
