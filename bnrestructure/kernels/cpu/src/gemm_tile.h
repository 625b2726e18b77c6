// The register tile behind gemm::multiply, one instantiation per tile height, width, order of A and kind of word.
#pragma once

#include "gemm.h"

namespace bnr::gemm {

using TileFunction = void (*)(const Product& p, const word* a, const word* b, float* c, int64_t columns,
                              const char* const* prefetch, int64_t prefetch_step);

struct FloatWords {
    static inline vf load(const word* p) { return bnr::load(reinterpret_cast<const float*>(p)); }
    static inline vf broadcast(const word* p) { return set1(*reinterpret_cast<const float_word*>(p)); }
    static inline vf multiply_add(vf a, vf b, vf c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct BFloat16PairWords {
    static inline __m512i load(const word* p) { return _mm512_loadu_si512(p); }
    static inline __m512i broadcast(const word* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
    static inline vf multiply_add(__m512i a, __m512i b, vf c) {
        return vf{_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)};
    }
};
#endif

template <int MR, int NV, Order order, class Word>
void tile(const Product& p, const word* a0, const word* b0, float* c, int64_t columns,
          const char* const* prefetch, int64_t prefetch_step) {
    constexpr int kGroups = (MR + 2) / 3;   // rows share address registers in threes: base, base + lda, base + 2 lda
    vf acc[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        // Requests C early: the loads (or the stores' ownership requests) at the end then find it in cache.
        __builtin_prefetch(c + i * p.ldc, 1);
        if (NV > 1) __builtin_prefetch(c + i * p.ldc + W, 1);
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) acc[i][j] = zero();
    }
    const int64_t lda = p.lda, ldb = p.ldb, depth = p.k;
    for (int64_t t = 0; t < p.taps.count; t++) {
        const word* a = a0 + p.taps.a[t];
        const word* b = b0 + p.taps.b[t];
        const word* rows[kGroups];
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; g++) rows[g] = a + 3 * g * lda;
        for (int64_t k = 0; k < depth; k++) {
            decltype(Word::load(b)) column[NV];
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) column[j] = Word::load(b + j * W);
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) {
                const word* source = order == Order::kColumns ? a + i : rows[i / 3] + (i % 3) * lda;
                const auto row = Word::broadcast(source);
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++) acc[i][j] = Word::multiply_add(row, column[j], acc[i][j]);
            }
            b += ldb;
            if (order == Order::kColumns) {
                a += lda;
            } else {
#pragma GCC unroll 8
                for (int g = 0; g < kGroups; g++) rows[g]++;
            }
            if (k & 1) {
                __builtin_prefetch(*prefetch, 0, 2);
                prefetch += prefetch_step;
            }
        }
    }
    const int64_t tail = columns - (NV - 1) * W;   // valid columns of the last vector
    const auto finish = [&](auto lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            float* row = c + i * p.ldc;
#pragma GCC unroll 4
            for (int j = 0; j < NV - 1; j++) {
                store(row + j * W, p.accumulate ? acc[i][j] + load(row + j * W) : acc[i][j]);
            }
            float* last = row + (NV - 1) * W;
            store(last, p.accumulate ? acc[i][NV - 1] + load(last, lanes) : acc[i][NV - 1], lanes);
        }
    };
    if (tail == W) finish(full_lanes{});
    else finish(tail_lanes(static_cast<int>(tail)));
}

template <int NV, Order order, class Word, int... I>
TileFunction tile_of_height(int height, std::integer_sequence<int, I...>) {
    static constexpr TileFunction table[] = {tile<I + 1, NV, order, Word>...};
    return table[height - 1];
}

template <Order order, class Word>
void multiply_panels(const Product& p, Prefetch& prefetch) {
    const int64_t blocks = (p.m + kRows - 1) / kRows;
    const int64_t height = p.m / blocks, taller = p.m % blocks;   // balanced: 49 rows are 13, 12, 12, 12
    const int64_t requests = p.taps.count * (p.k / 2);
    constexpr auto heights = std::make_integer_sequence<int, kRows>{};
    for (int64_t n = 0; n < p.n; n += kPanel) {
        const int64_t columns = std::min(kPanel, p.n - n);
        const word* b = p.b + n / kPanel * p.panel_pitch;
        int64_t m = 0;
        for (int64_t block = 0; block < blocks; block++) {
            const int rows = static_cast<int>(height + (block < taller));
            const TileFunction run = columns > W ? tile_of_height<2, order, Word>(rows, heights)
                                                     : tile_of_height<1, order, Word>(rows, heights);
            int64_t step;
            const char* const* lines = prefetch.take(requests, step);
            run(p, p.a + (order == Order::kColumns ? m : m * p.lda), b, p.c + m * p.ldc + n, columns, lines, step);
            m += rows;
        }
    }
}

}  // namespace bnr::gemm
