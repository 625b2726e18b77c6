// The vector type for any machine, over the compiler's own vector extension. See simd.h for the meaning of each function.
#pragma once

#include <cmath>
#include <cstring>

namespace bnr {

constexpr int W = 4;  // what SSE2 and NEON have

typedef float float_lanes __attribute__((vector_size(16)));
typedef int32_t int_lanes __attribute__((vector_size(16)));
typedef uint32_t uint_lanes __attribute__((vector_size(16)));
typedef uint16_t half_lanes __attribute__((vector_size(8)));

struct vf {
    float_lanes v;
};
struct vmask {
    int_lanes m;
};
struct tail_lanes {
    int n;
    explicit tail_lanes(int n) : n(n) {}
};

BNR_INLINE vf zero() { return {float_lanes{}}; }
BNR_INLINE vf set1(float s) { return {float_lanes{s, s, s, s}}; }

BNR_INLINE vf load(const float* p) {
    vf a;
    std::memcpy(&a.v, p, sizeof a.v);
    return a;
}
BNR_INLINE void store(float* p, vf a) { std::memcpy(p, &a.v, sizeof a.v); }
BNR_INLINE vf load(const float* p, tail_lanes l) {
    float lanes[W] = {};
    for (int i = 0; i < l.n; i++) lanes[i] = p[i];
    return load(lanes);
}
BNR_INLINE void store(float* p, vf a, tail_lanes l) {
    float lanes[W];
    store(lanes, a);
    for (int i = 0; i < l.n; i++) p[i] = lanes[i];
}
// The upper halves of the lanes, rounded to nearest even; a NaN stays one.
BNR_INLINE half_lanes to_halves(vf a) {
    const uint_lanes bits = (uint_lanes)a.v, rounded = bits + 0x7fff + (bits >> 16 & 1), is_nan = (uint_lanes)(a.v != a.v);
    return __builtin_convertvector(((~is_nan & rounded) | (is_nan & (bits | 0x400000))) >> 16, half_lanes);
}
BNR_INLINE vf from_halves(half_lanes halves) { return {(float_lanes)(__builtin_convertvector(halves, uint_lanes) << 16)}; }

BNR_INLINE vf load(const bf16* p) {
    half_lanes halves;
    std::memcpy(&halves, p, sizeof halves);
    return from_halves(halves);
}
BNR_INLINE vf load(const bf16* p, tail_lanes l) {
    half_lanes halves{};
    for (int i = 0; i < l.n; i++) halves[i] = p[i].bits;
    return from_halves(halves);
}
BNR_INLINE void store(bf16* p, vf a) {
    const half_lanes halves = to_halves(a);
    std::memcpy(static_cast<void*>(p), &halves, sizeof halves);
}
BNR_INLINE void store(bf16* p, vf a, tail_lanes l) {
    const half_lanes halves = to_halves(a);
    for (int i = 0; i < l.n; i++) p[i].bits = halves[i];
}
BNR_INLINE vf load(const uint8_t* p, tail_lanes l) {
    float lanes[W] = {};
    for (int i = 0; i < l.n; i++) lanes[i] = p[i];
    return load(lanes);
}
BNR_INLINE vf load(const uint8_t* p) { return load(p, tail_lanes(W)); }
BNR_INLINE void store_index(uint8_t* p, vf a, tail_lanes l) {
    for (int i = 0; i < l.n; i++) p[i] = uint8_t(a.v[i]);
}
BNR_INLINE void store_index(uint8_t* p, vf a) { store_index(p, a, tail_lanes(W)); }
BNR_INLINE vf round_bf16(vf a) { return from_halves(to_halves(a)); }
BNR_INLINE vf keep(vf a, tail_lanes l) {
    for (int i = l.n; i < W; i++) a.v[i] = 0;
    return a;
}

BNR_INLINE vf operator+(vf a, vf b) { return {a.v + b.v}; }
BNR_INLINE vf operator-(vf a, vf b) { return {a.v - b.v}; }
BNR_INLINE vf operator*(vf a, vf b) { return {a.v * b.v}; }
BNR_INLINE vf operator/(vf a, vf b) { return {a.v / b.v}; }
BNR_INLINE vf operator-(vf a) { return {-a.v}; }
BNR_INLINE vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
BNR_INLINE vf fnma(vf a, vf b, vf c) { return {c.v - a.v * b.v}; }

BNR_INLINE vmask operator>(vf a, vf b) { return {a.v > b.v}; }
BNR_INLINE vmask operator>=(vf a, vf b) { return {a.v >= b.v}; }
BNR_INLINE vmask operator<(vf a, vf b) { return {a.v < b.v}; }
BNR_INLINE vmask operator<=(vf a, vf b) { return {a.v <= b.v}; }
BNR_INLINE vmask operator==(vf a, vf b) { return {a.v == b.v}; }
BNR_INLINE vmask operator&(vmask a, vmask b) { return {a.m & b.m}; }
BNR_INLINE vmask operator|(vmask a, vmask b) { return {a.m | b.m}; }
BNR_INLINE vf select(vmask m, vf a, vf b) {
    return {(float_lanes)((m.m & (int_lanes)a.v) | (~m.m & (int_lanes)b.v))};
}
BNR_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
BNR_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }

BNR_INLINE vf power_of_two_below(vf a) { return {(float_lanes)((int_lanes)a.v & 0x7f800000)}; }
BNR_INLINE vf sqrt(vf a) {
    for (int i = 0; i < W; i++) a.v[i] = std::sqrt(a.v[i]);
    return a;
}
BNR_INLINE float sum(vf a) {
    return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
}

// Adding and taking away 1.5 * 2^23 rounds to whole numbers, for |a| < 2^22: all that exp() asks for.
BNR_INLINE vf round_even(vf a) {
    const vf magic = set1(12582912.0f);
    return (a + magic) - magic;
}

BNR_INLINE float_lanes power_of_two(int_lanes n) { return (float_lanes)((uint_lanes)(n + 127) << 23); }
// In two steps, since 2^n alone may lie outside the floats while a * 2^n does not. Good for |n| <= 250.
BNR_INLINE vf scale2(vf a, vf n) {
    const vf finite = select(n == n, n, zero());  // converting a NaN is undefined; a is a NaN then, and stays one
    const int_lanes whole = __builtin_convertvector(finite.v, int_lanes), half = whole >> 1;
    return {a.v * power_of_two(half) * power_of_two(whole - half)};
}

}  // namespace bnr
