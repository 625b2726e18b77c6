// Reading a matrix by columns: the vectors that a transposed panel is made of.
#pragma once

#include "simd.h"

namespace bnr::conv {

#if defined(__AVX512F__)
// out[k] holds element k of the sixteen vectors r, which are overwritten: 4 x 4 blocks inside 128-bit lanes, then the lanes.
inline void transpose(__m512* r, __m512* out) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        const auto join_low = [](__m512 a, __m512 b) {
            return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        };
        const auto join_high = [](__m512 a, __m512 b) {
            return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        };
        r[i] = join_low(t[i], t[i + 2]);
        r[i + 1] = join_high(t[i], t[i + 2]);
        r[i + 2] = join_low(t[i + 1], t[i + 3]);
        r[i + 3] = join_high(t[i + 1], t[i + 3]);
    }
    // Lane l of r[4 i + j] now holds column 4 l + j of rows 4 i to 4 i + 3.
    for (int j = 0; j < 4; j++) {
        const __m512 even_top = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
        const __m512 odd_top = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        const __m512 even_bottom = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        const __m512 odd_bottom = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        out[j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
        out[4 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
        out[8 + j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
        out[12 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
    }
}
#endif

// out[k] holds element k of `rows` (at most W) neighbouring rows, for k in [0, columns), columns at most W; idle lanes are 0.
// Element (n, k) is p[n * row_stride + k * column_stride].
inline void load_columns(const float* p, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, vf* out) {
#if defined(__AVX512F__)
    if (column_stride == 1) {   // a cache line of each row at once
        __m512 r[16], made[16];
        const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
        for (int n = 0; n < 16; n++) r[n] = n < rows ? _mm512_maskz_loadu_ps(mask, p + n * row_stride) : _mm512_setzero_ps();
        transpose(r, made);
        for (int k = 0; k < 16; k++) out[k] = vf{made[k]};
        return;
    }
#endif
    for (int64_t k = 0; k < columns; k++) {
        float lanes[W] = {};
        for (int64_t n = 0; n < rows; n++) lanes[n] = p[n * row_stride + k * column_stride];
        out[k] = load(lanes);
    }
}

// Two values to a word, the first in the lower half.
inline void store_bf16_pairs(uint32_t* out, vf first, vf second) {
#if defined(__AVX512F__)
    const __m512i upper = _mm512_castps_si512(round_bf16(second).v);
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(round_bf16(first).v), 16), upper));
#else
    bf16 low[W], high[W];
    store(low, first);
    store(high, second);
    for (int i = 0; i < W; i++) out[i] = low[i].bits | static_cast<uint32_t>(high[i].bits) << 16;
#endif
}

}  // namespace bnr::conv
