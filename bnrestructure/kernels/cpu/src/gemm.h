// Register-tiled matrix multiplication over 4-byte words: the inner product of every dense convolution kernel.
//
//   C[m, n] (+)= sum over taps t, sum over k:  A_t[m, k] * B_t[k, n]
//
// A word is one float, or a pair of bfloat16 values whose product is a two-term dot product accumulated in fp32. All
// offsets and pitches are counted in words, so one loop nest serves both, and one of matrix tiles where there are any. The list of taps (an offset into A and one
// into B for each) keeps a whole k x k window, or a whole column of pixel rows, in the accumulators: C is touched once.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "simd.h"

namespace bnr::gemm {

// Storage is written through float or bfloat16 pointers and read through these.
using word = std::uint32_t __attribute__((may_alias));
using float_word = float __attribute__((may_alias));

// Tiles are of pairs, too, but whole ones along k: where k is no multiple of kTileWords, both operands go on with zeros.
enum class Words { kFloat, kBFloat16Pair, kBFloat16Tile };

// How A is stored: one row after the other (row pitch lda), or one k after the other (k pitch lda, rows adjacent).
enum class Order { kRows, kColumns };

constexpr int kVectors = 2;                          // vectors of C side by side in one register tile
constexpr int64_t kPanel = kVectors * W;    // columns of B in one panel
#if defined(__AVX512F__)
constexpr int kRows = 14;                            // rows of C in one register tile: 28 of 32 registers accumulate
#else
constexpr int kRows = 6;                             // 12 of 16 registers
#endif
constexpr int64_t kTileWords = 16;                   // words of k in a matrix tile: 16 rows of 64 bytes

struct Taps {
    int64_t count;
    const int64_t* a;
    const int64_t* b;
};

// One tap at offset zero: a plain matrix product.
inline Taps single_tap() {
    static constexpr int64_t zero[1] = {0};
    return {1, zero, zero};
}

// The cache lines that the *next* tile will need. The inner loops of this tile request one of them every other step,
// which hides main-memory latency behind arithmetic without flooding the core's miss buffers.
class Prefetch {
public:
    void clear() {
        lines_.clear();
        next_ = 0;
        steps_before_ = std::exchange(steps_, 0);
    }
    // Rows of `bytes` each, `pitch` bytes apart.
    void add(const void* base, int64_t pitch, int64_t rows, int64_t bytes);
    // A run of `count` lines to request, and in `step` how far to move after each (0: keep requesting a dummy).
    const char* const* take(int64_t count, int64_t& step);
    // For matrix tiles, whose steps are fewer and longer: how many lines each of `steps` steps should request, if all that come before
    // the next clear() are as many as those before the last one.
    int64_t rate(int64_t steps);

private:
    std::vector<const char*> lines_;
    int64_t next_ = 0, steps_ = 0, steps_before_ = 0;
};

struct Product {
    Taps taps;
    int64_t m, n, k;
    const word* a;
    int64_t lda;
    const word* b;              // panels of kPanel columns
    int64_t ldb;           // pitch of k inside a panel
    int64_t panel_pitch;   // from one panel to the next
    float* c;
    int64_t ldc;
    bool accumulate;            // add to C, else overwrite it
};

// B must be readable, with any finite or non-finite content, up to a whole vector beyond column n - 1. Tiles: rows only; k a multiple
// of kTileWords; rows of A and B that do not begin on a cache line take several times as long to read.
void multiply(const Product& product, Order order, Words words, Prefetch& prefetch);

// Whether this library was compiled for a processor with bfloat16 dot products.
constexpr bool has_bfloat16_pairs() {
#if defined(__AVX512BF16__)
    return true;
#else
    return false;
#endif
}

// Whether it may use matrix tiles for them; library.py asks the processor before it loads a library that does.
constexpr bool has_bfloat16_tiles() {
#if defined(__AMX_BF16__)
    return true;
#else
    return false;
#endif
}

// k, or what it becomes where it is counted in tiles.
constexpr int64_t padded_depth(int64_t k, Words words) {
    return words == Words::kBFloat16Tile ? (k + kTileWords - 1) / kTileWords * kTileWords : k;
}

}  // namespace bnr::gemm
