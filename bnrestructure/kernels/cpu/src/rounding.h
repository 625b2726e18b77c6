// Rounding to bfloat16 that keeps, on average, terms too small to move any one value: kernels/rounding.py has the why.
#pragma once

#include "simd.h"

namespace bnr {

// For T of bfloat16: v plus a fixed pattern of the pixel's number, evenly spread over one unit in the last place of a bfloat16 at v.
// Rounded to the nearest, the result is v on average over neighbouring pixels. Zeros, infinities and NaNs stay what they are.
template <class T>
BNR_INLINE vf dithered(vf v, int64_t pixel);
template <>
BNR_INLINE vf dithered<float>(vf v, int64_t) { return v; }
template <>
BNR_INLINE vf dithered<bf16>(vf v, int64_t pixel) {
    const float offset = (float((pixel * 40503) & 0xffff) - 32767.5f) * 0x1p-23f;
    return fma(min(power_of_two_below(v), set1(0x1p127f)), set1(offset), v);
}

}  // namespace bnr
