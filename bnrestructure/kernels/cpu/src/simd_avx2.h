// The vector type on AVX2 with FMA. See simd.h for the meaning of each function.
#pragma once

#include <immintrin.h>

#include <cstring>

namespace bnr {

constexpr int W = 8;

struct vf {
    __m256 v;
};
struct vmask {
    __m256 m;
};
struct tail_lanes {
    __m256i m;
    int n;
    explicit tail_lanes(int n)
        : m(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))), n(n) {}
};

BNR_INLINE vf zero() { return {_mm256_setzero_ps()}; }
BNR_INLINE vf set1(float s) { return {_mm256_set1_ps(s)}; }

BNR_INLINE vf widen_bf16(__m128i h) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}

BNR_INLINE __m128i narrow_bf16(vf a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i halves = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(halves, halves);  // within each 128-bit half
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

BNR_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
BNR_INLINE vf load(const float* p, tail_lanes l) { return {_mm256_maskload_ps(p, l.m)}; }
BNR_INLINE vf load(const bf16* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
BNR_INLINE vf load(const bf16* p, tail_lanes l) {
    bf16 lanes[8] = {};
    for (int i = 0; i < l.n; i++) lanes[i] = p[i];
    return load(lanes);
}
BNR_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
BNR_INLINE void store(float* p, vf a, tail_lanes l) { _mm256_maskstore_ps(p, l.m, a.v); }
BNR_INLINE void store(bf16* p, vf a) { _mm_storeu_si128((__m128i*)p, narrow_bf16(a)); }
BNR_INLINE void store(bf16* p, vf a, tail_lanes l) {
    bf16 lanes[8];
    store(lanes, a);
    for (int i = 0; i < l.n; i++) p[i] = lanes[i];
}
BNR_INLINE vf load(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
BNR_INLINE vf load(const uint8_t* p, tail_lanes l) {
    uint8_t lanes[8] = {};
    for (int i = 0; i < l.n; i++) lanes[i] = p[i];
    return load(lanes);
}
BNR_INLINE void store_index(uint8_t* p, vf a) {
    const __m256i whole = _mm256_cvttps_epi32(a.v);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
BNR_INLINE void store_index(uint8_t* p, vf a, tail_lanes l) {
    uint8_t lanes[8];
    store_index(lanes, a);
    for (int i = 0; i < l.n; i++) p[i] = lanes[i];
}
BNR_INLINE vf round_bf16(vf a) { return widen_bf16(narrow_bf16(a)); }
BNR_INLINE vf keep(vf a, tail_lanes l) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(l.m))}; }

BNR_INLINE vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
BNR_INLINE vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
BNR_INLINE vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
BNR_INLINE vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
BNR_INLINE vf power_of_two_below(vf a) { return {_mm256_and_ps(a.v, _mm256_set1_ps(__builtin_inff()))}; }
BNR_INLINE vf operator-(vf a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
BNR_INLINE vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
BNR_INLINE vf fnma(vf a, vf b, vf c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
BNR_INLINE vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
BNR_INLINE vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
BNR_INLINE vf sqrt(vf a) { return {_mm256_sqrt_ps(a.v)}; }
BNR_INLINE float sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

BNR_INLINE vmask operator>(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
BNR_INLINE vmask operator>=(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
BNR_INLINE vmask operator<(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
BNR_INLINE vmask operator<=(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
BNR_INLINE vmask operator==(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
BNR_INLINE vmask operator&(vmask a, vmask b) { return {_mm256_and_ps(a.m, b.m)}; }
BNR_INLINE vmask operator|(vmask a, vmask b) { return {_mm256_or_ps(a.m, b.m)}; }
BNR_INLINE vf select(vmask m, vf a, vf b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }

BNR_INLINE vf round_even(vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

BNR_INLINE __m256 power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two steps, since 2^n alone may lie outside the floats while a * 2^n does not. Good for |n| <= 250.
BNR_INLINE vf scale2(vf a, vf n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)))};
}

}  // namespace bnr
