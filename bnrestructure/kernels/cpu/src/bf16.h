// bfloat16 storage: the upper half of a float. All arithmetic happens in float; this is only how a value is kept.
#pragma once

#include <cstdint>
#include <cstring>

namespace bnr {

struct bf16 {
    uint16_t bits;
};

inline float to_float(float v) { return v; }

inline float to_float(bf16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Round to nearest even; NaNs stay NaNs (adding the rounding constant could carry one into infinity).
inline bf16 to_bf16(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return bf16{uint16_t((bits >> 16) | 0x40)};
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
inline T from_float(float v);
template <>
inline float from_float<float>(float v) { return v; }
template <>
inline bf16 from_float<bf16>(float v) { return to_bf16(v); }

}  // namespace bnr
