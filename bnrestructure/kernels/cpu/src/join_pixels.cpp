#include "join_pixels.h"

#include <algorithm>

#include "activation.h"
#include "rounding.h"

namespace bnr {
namespace {

// So many pixels share one load of the vectors, and are summed among themselves before they join a tile's sums.
constexpr int64_t kFew = 8;

// A vector's part of an operand's affine transform; without one (x - 0) * 1 + 0, which is exact.
template <class Lanes>
struct OperandVectors {
    vf mean = zero(), scale = set1(1.0f), beta = zero();
    BNR_INLINE OperandVectors(const float* m, const float* s, const float* b, int64_t c, Lanes lanes) {
        if (m) mean = load(m + c, lanes), scale = load(s + c, lanes), beta = load(b + c, lanes);
    }
    BNR_INLINE vf operator()(vf x) const { return affine(x, mean, scale, beta); }
};

// Of pixels of one image, where there is a gate.
template <class Lanes>
struct JoinVectors {
    OperandVectors<Lanes> ty, tr;
    vf gate = set1(1.0f);
    BNR_INLINE JoinVectors(const Join& j, const float* gates, int64_t c, Lanes lanes)
        : ty(j.y_mean, j.y_scale, j.y_beta, c, lanes), tr(j.r_mean, j.r_scale, j.r_beta, c, lanes) {
        if (gates) gate = load(gates + c, lanes);
    }
    BNR_INLINE vf sum(vf y, vf r) const { return fma(ty(y), gate, tr(r)); }
};

// f(first pixel, pixels, their gates or null) for the parts of the pixels that lie in one image; for all of them without a gate.
template <class F>
BNR_INLINE void for_each_image(const Join& join, int64_t pixel, int64_t pixels, F&& f) {
    if (!join.gate) return f(pixel, pixels, nullptr);
    for (const int64_t end = pixel + pixels; pixel < end;) {
        const int64_t image = pixel / join.image_pixels;
        const int64_t next = std::min(end, (image + 1) * join.image_pixels);
        f(pixel, next - pixel, join.gate + image * join.gate_pitch);
        pixel = next;
    }
}

template <Act A>
BNR_INLINE Activation activation_of(const Join& join) {
    return {A == Act::any ? static_cast<Act>(join.activation) : A, static_cast<float>(join.slope)};
}

// Asks for what the next few pixels will touch at this channel: going through them channel by channel is an order in which the processor's
// own prefetchers see no streams.
template <int kWrites, class T>
BNR_INLINE void request(const T* x, int64_t ld, int64_t i, int64_t c) {
    __builtin_prefetch(x + (i + kFew) * ld + c, kWrites);
}

template <class Lanes>
BNR_INLINE void add_to(float* sum, vf value, Lanes lanes) {
    store(sum, load(sum, lanes) + value, lanes);
}

template <Act A, class T>
BNR_FLATTEN void join_run(const Join& join, const float* gates, int64_t pixel, int64_t pixels, int64_t channels, T* z, int64_t ldz,
                          Moments* moments) {
    const int64_t ldy = join.y_pitch, ldr = join.r_pitch;
    const T* y = static_cast<const T*>(join.y) + pixel * ldy;
    const T* r = static_cast<const T*>(join.r) + pixel * ldr;
    const Activation act = activation_of<A>(join);
    for (int64_t begin = 0; begin < pixels; begin += kFew) {
        const int64_t end = std::min(pixels, begin + kFew);
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            const JoinVectors<decltype(lanes)> v(join, gates, c, lanes);
            const vf shift = moments ? load(moments->shift + c) : zero();
            vf sum = zero(), square = zero();
            for (int64_t i = begin; i < end; i++) {
                request<0>(y, ldy, i, c), request<0>(r, ldr, i, c), request<1>(z, ldz, i, c);
                const vf result = activate<A>(v.sum(load(y + i * ldy + c, lanes), load(r + i * ldr + c, lanes)), act);
                store(z + i * ldz + c, result, lanes);
                const vf d = stored<T>(result) - shift;
                sum = sum + d;
                square = fma(d, d, square);
            }
            if (!moments) return;
            store(moments->sum + c, load(moments->sum + c) + sum);
            store(moments->square + c, load(moments->square + c) + square);
        });
    }
}

template <Act A, class T, class Gradient>
BNR_FLATTEN void join_gradient_run(const Gradient* g, int64_t ldg, const Join& join, const float* gates, int64_t pixel, int64_t channel,
                                   int64_t pixels, int64_t channels, float factor, T* dx, int64_t lddx, bool accumulate,
                                   const JoinSums& sums, const StatisticsEdge* edge) {
    const int64_t ldy = join.y_pitch, ldr = join.r_pitch, ldz = edge ? edge->ldz : 0;
    const T* y = static_cast<const T*>(join.y) + pixel * ldy + channel;
    const T* r = static_cast<const T*>(join.r) + pixel * ldr + channel;
    const T* z = edge ? static_cast<const T*>(edge->z) + pixel * ldz + channel : nullptr;
    const Activation act = activation_of<A>(join);
    for (int64_t begin = 0; begin < pixels; begin += kFew) {
        const int64_t end = std::min(pixels, begin + kFew);
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            const JoinVectors<decltype(lanes)> v(join, gates, channel + c, lanes);
            const vf a = edge ? load(edge->a + channel + c, lanes) : zero(), b = edge ? load(edge->b + channel + c, lanes) : zero();
            const vf mean = edge ? load(edge->mean + channel + c, lanes) : zero();
            vf sp = zero(), spy = zero(), spr = zero();
            for (int64_t i = begin; i < end; i++) {
                request<0>(y, ldy, i, c), request<0>(r, ldr, i, c), request<0>(g, ldg, i, c), request<1>(dx, lddx, i, c);
                const vf vy = load(y + i * ldy + c, lanes), vr = load(r + i * ldr + c, lanes);
                T* to = dx + i * lddx + c;
                vf p = load(g + i * ldg + c, lanes) * set1(factor);
                if (accumulate) p = p + load(to, lanes);
                if (edge) p = p + fma(a, load(z + i * ldz + c, lanes) - mean, b);
                vf state;
                activate<A>(v.sum(vy, vr), act, state);
                p = pull_back<A>(p, state, act);
                sp = sp + p;
                spy = fma(p, vy - v.ty.mean, spy);
                spr = fma(p, vr - v.tr.mean, spr);
                store(to, edge ? dithered<T>(p, pixel + i) : p, lanes);
            }
            add_to(sums.p + c, sp, lanes), add_to(sums.py + c, spy, lanes), add_to(sums.pr + c, spr, lanes);
        });
    }
}

}  // namespace

template <class T>
void join_pixels(const Join& join, int64_t pixel, int64_t pixels, int64_t channels, T* z, int64_t ldz, Moments* moments) {
    with_activation(static_cast<Act>(join.activation), [&](auto act) {
        for_each_image(join, pixel, pixels, [&](int64_t first, int64_t count, const float* gates) {
            join_run<decltype(act)::value>(join, gates, first, count, channels, z + (first - pixel) * ldz, ldz, moments);
        });
    });
}

template <class T, class Gradient>
void join_gradient_pixels(const Gradient* g, int64_t ldg, const Join& join, int64_t pixel, int64_t channel, int64_t pixels,
                          int64_t channels, float factor, T* dx, int64_t lddx, bool accumulate, const JoinSums& sums,
                          const StatisticsEdge* edge) {
    with_activation(static_cast<Act>(join.activation), [&](auto act) {
        for_each_image(join, pixel, pixels, [&](int64_t first, int64_t count, const float* gates) {
            const int64_t skipped = first - pixel;
            join_gradient_run<decltype(act)::value>(g + skipped * ldg, ldg, join, gates, first, channel, count, channels, factor,
                                                    dx + skipped * lddx, lddx, accumulate, sums, edge);
        });
    });
}

template void join_pixels(const Join&, int64_t, int64_t, int64_t, float*, int64_t, Moments*);
template void join_pixels(const Join&, int64_t, int64_t, int64_t, bf16*, int64_t, Moments*);
#define BNR_FOR(T, Gradient)                                                                                                 \
    template void join_gradient_pixels(const Gradient*, int64_t, const Join&, int64_t, int64_t, int64_t, int64_t, float, T*, \
                                       int64_t, bool, const JoinSums&, const StatisticsEdge*);
BNR_FOR(float, float)
BNR_FOR(bf16, float)
BNR_FOR(bf16, bf16)
#undef BNR_FOR

}  // namespace bnr
