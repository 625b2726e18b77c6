#include "conv_pairs.h"

#include "pack_transpose.h"

namespace bnr::conv {

void pair_pixels(const bf16* first, const bf16* second, int64_t ld, int64_t pixels, int64_t channels, gemm::word* out,
                 int64_t ldo) {
    for (int64_t i = 0; i < pixels; i++) {
        const bf16* a = first + i * ld;
        gemm::word* to = out + i * ldo;
        if (second) {
            const bf16* b = second + i * ld;
            for (int64_t c = 0; c < channels; c++) to[c] = a[c].bits | static_cast<uint32_t>(b[c].bits) << 16;
        } else {
            for (int64_t c = 0; c < channels; c++) to[c] = a[c].bits;
        }
    }
}

#if defined(__AVX512BF16__)

void transpose_pairs(const bf16* from, int64_t ld, int64_t pixels, int64_t channels, gemm::word* out, int64_t ldo, int64_t words) {
    for (int64_t k = 0; k < words; k += 16) {
        const __mmask16 kept = static_cast<__mmask16>((1u << std::min<int64_t>(16, words - k)) - 1);
        for (int64_t c = 0; c < channels; c += 16) {
            const int64_t count = std::min<int64_t>(16, channels - c);
            const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1);
            const auto pixel = [&](int64_t i) {
                return i < pixels ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from + i * ld + c)) : _mm512_setzero_si512();
            };
            __m512 pairs[16], made[16];
            for (int i = 0; i < 16; i++) {
                const __m512i first = pixel(2 * (k + i)), second = pixel(2 * (k + i) + 1);
                pairs[i] = _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
            }
            transpose(pairs, made);
            for (int64_t n = 0; n < count; n++) _mm512_mask_storeu_ps(out + (c + n) * ldo + k, kept, made[n]);
        }
    }
}

#else

void transpose_pairs(const bf16*, int64_t, int64_t, int64_t, gemm::word*, int64_t, int64_t) { __builtin_trap(); }

#endif

}  // namespace bnr::conv
