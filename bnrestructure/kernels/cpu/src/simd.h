// The vector type every kernel is written in: `vf`, W floats. W is 16 with AVX-512, 8 with AVX2 and 4 elsewhere; which it is
// follows from the flags the file is compiled with, and each instruction set's library is compiled from the same sources.
//
//   W                                   floats in a vector
//   zero()  set1(s)                     constants
//   load(p)      store(p, v)            p: float* or bf16*, no alignment needed; bf16 stores round to nearest even
//   load(p, l)   store(p, v, l)         only the lanes of l: full_lanes (all W) or tail_lanes (the first n, 0 < n < W).
//                                       Other lanes load as 0, and their memory is neither read nor written.
//   load(p, l)   store_index(p, v, l)   the same on uint8_t*: whole numbers from 0 to 255
//   a + b  a - b  a * b  a / b  -a
//   fma(a, b, c) = a*b + c              fnma(a, b, c) = c - a*b          (fused where the machine can)
//   max(a, b) = a > b ? a : b           min(a, b) = a < b ? a : b        a NaN in either operand gives b
//   a > b  a >= b  a < b  a <= b  a == b   a mask;  m & n, m | n;  select(m, a, b) = m ? a : b (false where NaN)
//   keep(v, l)                          v with the lanes outside l set to 0
//   round_even(a)  scale2(a, n)         nearest integer;  a * 2^n for whole n, over- and underflowing as it should
//   power_of_two_below(a)               the largest power of two <= |a|; 0 for 0 and below the normal range, inf for inf and NaN
//   sqrt(a)  sum(a)                     sum is of all lanes, to one float
//   prefetch(p)  prefetch_write(p)      hints; any address is allowed
//
// The idiom for any number of channels: write the body once, taking the lanes as a template argument, and let
// for_each_vector() call it with full_lanes for whole vectors and with tail_lanes for the rest.
#pragma once

#include <cstdint>

#include "bf16.h"

#define BNR_INLINE inline __attribute__((always_inline))
#define BNR_FLATTEN __attribute__((flatten))  // inline every call in the body, lambdas too

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace bnr {

struct full_lanes {};

BNR_INLINE vf load(const float* p, full_lanes) { return load(p); }
BNR_INLINE vf load(const bf16* p, full_lanes) { return load(p); }
BNR_INLINE vf load(const uint8_t* p, full_lanes) { return load(p); }
BNR_INLINE void store_index(uint8_t* p, vf v, full_lanes) { store_index(p, v); }
BNR_INLINE void store(float* p, vf v, full_lanes) { store(p, v); }
BNR_INLINE void store(bf16* p, vf v, full_lanes) { store(p, v); }
BNR_INLINE vf keep(vf v, full_lanes) { return v; }

BNR_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
BNR_INLINE void prefetch_write(const void* p) { __builtin_prefetch(p, 1, 2); }

// The value a store to T and a load from it would give back: what statistics "of the value as stored" are taken of.
template <class T>
BNR_INLINE vf stored(vf v);
template <>
BNR_INLINE vf stored<float>(vf v) { return v; }
template <>
BNR_INLINE vf stored<bf16>(vf v) { return round_bf16(v); }

// f(c, lanes) for every vector of channels [0, n); the last may be partial.
template <class F>
BNR_INLINE void for_each_vector(int64_t n, F&& f) {
    int64_t c = 0;
    for (; c + W <= n; c += W) f(c, full_lanes{});
    if (c < n) f(c, tail_lanes(int(n - c)));
}

// n rounded up to whole vectors: the length of scratch that may be loaded and stored without a tail.
inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

}  // namespace bnr
