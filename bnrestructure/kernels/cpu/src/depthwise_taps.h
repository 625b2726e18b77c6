// The inner loop of the depthwise convolution's backward pass, for one vector of channels and up to COLUMNS positions
// of a row of x. The gradient at z and the weight's gradient read the same values of dY, so they share each load:
//
//     g[i] = sum over taps of weight[tap] * dY[tap, i]          dweight[tap] += sum over i of z[i] * dY[tap, i]
#pragma once

#include "depthwise_rows.h"

namespace bnr::depthwise {

struct TapOperands {
    const Tap* taps;
    int64_t tap_count;
    int64_t offset;         // from a tap's row to this vector of channels and first column
    const float* weight;    // [kernel position], weight_pitch apart
    int64_t weight_pitch;
    const float* z;         // [COLUMNS][W]
    float* g;               // [COLUMNS][W]
    float* dweight;         // [kernel position], dweight_pitch apart
    int64_t dweight_pitch;
};

template <int N, bool INPUT, bool WEIGHT>
void apply_taps(const TapOperands& o) {
    vf g[N], z[N];
    for (int i = 0; i < N; i++) g[i] = zero(), z[i] = load(o.z + i * W);
    for (int64_t k = 0; k < o.tap_count; k++) {
        const float* d = o.taps[k].row + o.offset;
        const vf w = load(o.weight + o.taps[k].weight * o.weight_pitch);
        float* target = o.dweight + o.taps[k].weight * o.dweight_pitch;
        vf even = WEIGHT ? load(target) : zero(), odd = zero();
        for (int i = 0; i < N; i++) {
            const vf v = load(d + i * W);
            if (INPUT) g[i] = fma(w, v, g[i]);
            if (WEIGHT && i % 2 == 0) even = fma(z[i], v, even);
            if (WEIGHT && i % 2 == 1) odd = fma(z[i], v, odd);
        }
        if (WEIGHT) store(target, even + odd);
    }
    for (int i = 0; INPUT && i < N; i++) store(o.g + i * W, g[i]);
}

using TapKernel = void (*)(const TapOperands&);

template <bool INPUT, bool WEIGHT>
TapKernel tap_kernel(int64_t columns) {
    TapKernel kernel = nullptr;
    with_columns(columns, [&](auto n) { kernel = apply_taps<decltype(n)::value, INPUT, WEIGHT>; });
    return kernel;
}

inline TapKernel tap_kernel(int64_t columns, bool input, bool weight) {
    if (input && weight) return tap_kernel<true, true>(columns);
    return input ? tap_kernel<true, false>(columns) : tap_kernel<false, true>(columns);
}

}  // namespace bnr::depthwise
