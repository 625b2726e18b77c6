// gemm::multiply on tiles of bfloat16 pairs (Intel's AMX), where the processor has them; elsewhere it is never called.
//
// Two by two tiles of C accumulate, 32 rows by one panel of columns; of A and B two tiles each pass by. The tile unit multiplies a
// pair of tiles in 16 cycles and loads one in 8, so that four loads hide behind four products.
#include <algorithm>

#include "gemm.h"

namespace bnr::gemm {

#if defined(__AMX_BF16__)

namespace {

constexpr int64_t kTileRows = 16, kTileColumns = 16;   // of C, in floats

// The operands of _tile_loadconfig: rows and bytes a row of each of the eight tiles.
struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The compiler's own intrinsics do not tell it, in GCC 12, which memory they read.
#define BNR_TILE_LOAD(tile, from, pitch) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(pitch) : "memory")
// The same, leaving the first-level cache to others.
#define BNR_TILE_STREAM(tile, from, pitch) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(pitch) : "memory")
#define BNR_TILE_STORE(tile, to, pitch) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(pitch) : "memory")
#define BNR_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define BNR_TILE_MULTIPLY_ADD(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

// Tiles 0 to 3 are C, row by row; 4 and 5 are A; 6 and 7 are B.
void configure(int64_t rows, int64_t columns) {
    const int64_t heights[2] = {std::min(rows, kTileRows), std::max<int64_t>(rows - kTileRows, 0)};
    const int64_t widths[2] = {std::min(columns, kTileColumns), std::max<int64_t>(columns - kTileColumns, 0)};
    Configuration c;
    const auto set = [&](int tile, int64_t height, int64_t width) {
        const bool used = height > 0 && width > 0;
        c.rows[tile] = static_cast<uint8_t>(used ? height : 0);
        c.row_bytes[tile] = static_cast<uint16_t>(used ? width * 4 : 0);
    };
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++) set(2 * i + j, heights[i], widths[j]);
        set(4 + i, heights[i], kTileWords);
        set(6 + i, kTileWords, widths[i]);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(c));
}

// kStream: no tap reads what another has read.
template <int kTall, int kWide, bool kStream>
void tile(const Product& p, const word* a0, const word* b0, float* c, const char* const* prefetch, int64_t prefetch_step,
          int64_t requests) {
    const int64_t lda = p.lda * 4, ldb = p.ldb * 4, ldc = p.ldc * 4;
    float* const lower = c + kTileRows * p.ldc;
    if (p.accumulate) {
        BNR_TILE_LOAD(0, c, ldc);
        if constexpr (kWide > 1) BNR_TILE_LOAD(1, c + kTileColumns, ldc);
        if constexpr (kTall > 1) BNR_TILE_LOAD(2, lower, ldc);
        if constexpr (kTall > 1 && kWide > 1) BNR_TILE_LOAD(3, lower + kTileColumns, ldc);
    } else {
        BNR_TILE_ZERO(0);
        if constexpr (kWide > 1) BNR_TILE_ZERO(1);
        if constexpr (kTall > 1) BNR_TILE_ZERO(2);
        if constexpr (kTall > 1 && kWide > 1) BNR_TILE_ZERO(3);
    }
    for (int64_t t = 0; t < p.taps.count; t++) {
        const word* a = a0 + p.taps.a[t];
        const word* b = b0 + p.taps.b[t];
        for (int64_t k = 0; k < p.k; k += kTileWords) {
            if constexpr (kStream) BNR_TILE_STREAM(4, a, lda);
            else BNR_TILE_LOAD(4, a, lda);
            BNR_TILE_LOAD(6, b, ldb);
            BNR_TILE_MULTIPLY_ADD(0, 4, 6);
            if constexpr (kWide > 1) {
                BNR_TILE_LOAD(7, b + kTileColumns, ldb);
                BNR_TILE_MULTIPLY_ADD(1, 4, 7);
            }
            if constexpr (kTall > 1) {
                if constexpr (kStream) BNR_TILE_STREAM(5, a + kTileRows * p.lda, lda);
                else BNR_TILE_LOAD(5, a + kTileRows * p.lda, lda);
                BNR_TILE_MULTIPLY_ADD(2, 5, 6);
                if constexpr (kWide > 1) BNR_TILE_MULTIPLY_ADD(3, 5, 7);
            }
            a += kTileWords;
            b += kTileWords * p.ldb;
            for (int64_t i = 0; i < requests; i++) {
                __builtin_prefetch(*prefetch, 0, 2);
                prefetch += prefetch_step;
            }
        }
    }
    BNR_TILE_STORE(0, c, ldc);
    if constexpr (kWide > 1) BNR_TILE_STORE(1, c + kTileColumns, ldc);
    if constexpr (kTall > 1) BNR_TILE_STORE(2, lower, ldc);
    if constexpr (kTall > 1 && kWide > 1) BNR_TILE_STORE(3, lower + kTileColumns, ldc);
}

template <bool kStream>
auto tile_of(bool tall, bool wide) {
    return tall ? (wide ? tile<2, 2, kStream> : tile<2, 1, kStream>) : (wide ? tile<1, 2, kStream> : tile<1, 1, kStream>);
}

}  // namespace

void multiply_bfloat16_tiles(const Product& p, Prefetch& prefetch) {
    const int64_t steps = p.taps.count * (p.k / kTileWords);
    const int64_t blocks = (p.m + 2 * kTileRows - 1) / (2 * kTileRows) * ((p.n + kPanel - 1) / kPanel);
    const int64_t requests = prefetch.rate(steps * blocks);   // a step
    int64_t set_rows = 0, set_columns = 0;
    for (int64_t n = 0; n < p.n; n += kPanel) {
        const int64_t columns = std::min(kPanel, p.n - n);
        const word* b = p.b + n / kPanel * p.panel_pitch;
        for (int64_t m = 0; m < p.m; m += 2 * kTileRows) {
            const int64_t rows = std::min(2 * kTileRows, p.m - m);
            if (rows != set_rows || columns != set_columns) configure(set_rows = rows, set_columns = columns);
            const bool tall = rows > kTileRows, wide = columns > kTileColumns;
            const auto run = p.taps.count == 1 ? tile_of<true>(tall, wide) : tile_of<false>(tall, wide);
            int64_t step;
            const char* const* lines = prefetch.take(steps * requests, step);
            run(p, p.a + m * p.lda, b, p.c + m * p.ldc + n, lines, step, requests);
        }
    }
    __asm__ volatile("tilerelease" : :);   // others who use the tiles, oneDNN say, find them as they left them
}

#else

void multiply_bfloat16_tiles(const Product&, Prefetch&) { __builtin_trap(); }

#endif

}  // namespace bnr::gemm
