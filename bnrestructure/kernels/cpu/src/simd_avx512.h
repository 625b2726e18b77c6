// The vector type on AVX-512 (F, BW, VL, DQ; BF16 where compiled in). See simd.h for the meaning of each function.
#pragma once

#include <immintrin.h>

namespace bnr {

constexpr int W = 16;

struct vf {
    __m512 v;
};
struct vmask {
    __mmask16 m;
};
struct tail_lanes {
    __mmask16 m;
    explicit tail_lanes(int n) : m(__mmask16((1u << n) - 1)) {}
};

BNR_INLINE vf zero() { return {_mm512_setzero_ps()}; }
BNR_INLINE vf set1(float s) { return {_mm512_set1_ps(s)}; }

BNR_INLINE vf widen_bf16(__m256i h) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}

BNR_INLINE __m256i narrow_bf16(vf a) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}

BNR_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
BNR_INLINE vf load(const float* p, tail_lanes l) { return {_mm512_maskz_loadu_ps(l.m, p)}; }
BNR_INLINE vf load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
BNR_INLINE vf load(const bf16* p, tail_lanes l) { return widen_bf16(_mm256_maskz_loadu_epi16(l.m, p)); }
BNR_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
BNR_INLINE void store(float* p, vf a, tail_lanes l) { _mm512_mask_storeu_ps(p, l.m, a.v); }
BNR_INLINE void store(bf16* p, vf a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a)); }
BNR_INLINE void store(bf16* p, vf a, tail_lanes l) { _mm256_mask_storeu_epi16(p, l.m, narrow_bf16(a)); }
BNR_INLINE vf load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
BNR_INLINE vf load(const uint8_t* p, tail_lanes l) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(l.m, p)))};
}
BNR_INLINE __m128i narrow_index(vf a) { return _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a.v)); }
BNR_INLINE void store_index(uint8_t* p, vf a) { _mm_storeu_si128((__m128i*)p, narrow_index(a)); }
BNR_INLINE void store_index(uint8_t* p, vf a, tail_lanes l) { _mm_mask_storeu_epi8(p, l.m, narrow_index(a)); }
BNR_INLINE vf round_bf16(vf a) { return widen_bf16(narrow_bf16(a)); }
BNR_INLINE vf keep(vf a, tail_lanes l) { return {_mm512_maskz_mov_ps(l.m, a.v)}; }

BNR_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
BNR_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
BNR_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
BNR_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
BNR_INLINE vf operator-(vf a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
BNR_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
BNR_INLINE vf fnma(vf a, vf b, vf c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
BNR_INLINE vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
BNR_INLINE vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
BNR_INLINE vf sqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
BNR_INLINE float sum(vf a) { return _mm512_reduce_add_ps(a.v); }

BNR_INLINE vmask operator>(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
BNR_INLINE vmask operator>=(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
BNR_INLINE vmask operator<(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
BNR_INLINE vmask operator<=(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
BNR_INLINE vmask operator==(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
BNR_INLINE vmask operator&(vmask a, vmask b) { return {__mmask16(a.m & b.m)}; }
BNR_INLINE vmask operator|(vmask a, vmask b) { return {__mmask16(a.m | b.m)}; }
BNR_INLINE vf select(vmask m, vf a, vf b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }

BNR_INLINE vf round_even(vf a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
BNR_INLINE vf power_of_two_below(vf a) { return {_mm512_and_ps(a.v, _mm512_set1_ps(__builtin_inff()))}; }
BNR_INLINE vf scale2(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }

}  // namespace bnr
