#include "conv_pixels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace bnr::conv {

namespace {

// Stores what the products read: the value rounded to T, kept as Out.
template <class T, class Out, class Lanes>
BNR_INLINE void put(Out* p, vf v, Lanes lanes) {
    if constexpr (std::is_same_v<Out, float>) {
        store(p, stored<T>(v), lanes);
    } else {
        store(p, v, lanes);
    }
}

// Scratch of bfloat16 is read as pairs: the partner of the last of an odd number of channels is a zero. (A tensor has no
// room for a partner, and needs none.)
template <class Out>
BNR_INLINE void put_partner(Out* pixel, int64_t channels, int64_t pitch) {
    if constexpr (std::is_same_v<Out, bf16>) {
        if (channels % 2 && pitch > channels) pixel[channels] = bf16{0};
    }
}

template <bool kAffine, class Lanes>
BNR_INLINE vf activation_input(vf x, const InputTransform& t, int64_t c, Lanes lanes) {
    if constexpr (!kAffine) return x;
    return affine(x, load(t.mean + c, lanes), load(t.scale + c, lanes), load(t.beta + c, lanes));
}

template <Act A, bool kAffine, bool kGate, class T, class Out>
void transform_run(const T* x, int64_t ldx, int64_t pixels, int64_t channels, const InputTransform& t, Out* z,
                   int64_t ldz) {
    for (int64_t i = 0; i < pixels; i++) {
        const T* from = x + i * ldx;
        Out* to = z + i * ldz;
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            vf v = activate<A>(activation_input<kAffine>(load(from + c, lanes), t, c, lanes), t.act);
            if constexpr (kGate) v = v * load(t.gate + c, lanes);
            put<T>(to + c, v, lanes);
        });
        put_partner(to, channels, ldz);
    }
}

// So many pixels are summed among themselves before they join a tile's sums, as in add_moments(): a gradient that is zero but for
// rounding (of a bias that a batch norm behind it takes away, say) should be no further from zero than eager's.
constexpr int64_t kFew = 16;

template <class Lanes>
BNR_INLINE void add_to(float* sum, vf value, Lanes lanes) {
    store(sum, load(sum, lanes) + value, lanes);
}

template <Act A, bool kAffine, class T>
void input_gradient_run(const float* g, int64_t ldg, const T* x, int64_t ldx, int64_t pixels, int64_t channels,
                        const InputTransform& t, float factor, T* dx, int64_t lddx, bool accumulate, float* sum_p,
                        float* sum_px) {
    // Channels outside, so that the sums stay in registers while the run goes by.
    for_each_vector(channels, [&](int64_t c, auto lanes) {
        vf mean = zero(), scale = zero(), beta = zero();
        if constexpr (kAffine) mean = load(t.mean + c, lanes), scale = load(t.scale + c, lanes), beta = load(t.beta + c, lanes);
        const auto few = [&](int64_t begin, int64_t end, auto adds) {
            vf sp = zero(), spx = zero();
            for (int64_t i = begin; i < end; i++) {
                vf p = load(g + i * ldg + c, lanes) * set1(factor);
                if constexpr (kAffine || A != Act::identity) {
                    const vf v = load(x + i * ldx + c, lanes);
                    vf state;
                    if constexpr (kAffine) {
                        activate<A>(affine(v, mean, scale, beta), t.act, state);
                    } else {
                        activate<A>(v, t.act, state);
                    }
                    p = pull_back<A>(p, state, t.act);
                    if constexpr (kAffine) {
                        sp = sp + p;
                        spx = fma(p, v - mean, spx);
                        p = p * scale;
                    }
                }
                T* to = dx + i * lddx + c;
                if constexpr (decltype(adds)::value) p = p + load(to, lanes);
                store(to, p, lanes);
            }
            if constexpr (kAffine) add_to(sum_p + c, sp, lanes), add_to(sum_px + c, spx, lanes);
        };
        for (int64_t i = 0; i < pixels; i += kFew) {
            if (accumulate) few(i, std::min(pixels, i + kFew), std::true_type{});
            else few(i, std::min(pixels, i + kFew), std::false_type{});
        }
    });
}

template <Act A, bool kAffine, class T>
void gated_gradient_run(const float* g, int64_t ldg, const T* x, int64_t ldx, int64_t pixels, int64_t channels,
                        const InputTransform& t, float factor, T* dx, int64_t lddx, bool accumulate, float* sum_gate) {
    for_each_vector(channels, [&](int64_t c, auto lanes) {
        const vf gate = load(t.gate + c, lanes);
        for (int64_t begin = 0; begin < pixels; begin += kFew) {
            const int64_t end = std::min(pixels, begin + kFew);
            vf sum = zero();
            for (int64_t i = begin; i < end; i++) {
                const vf value = load(g + i * ldg + c, lanes) * set1(factor);
                const vf u = activation_input<kAffine>(load(x + i * ldx + c, lanes), t, c, lanes);
                sum = fma(value, activate<A>(u, t.act), sum);
                T* to = dx + i * lddx + c;
                vf d = value * gate;
                if (accumulate) d = d + load(to, lanes);
                store(to, d, lanes);
            }
            add_to(sum_gate + c, sum, lanes);
        }
    });
}

// f(has s, has a and b), as types.
template <class F>
void with_edge(const OutputEdge& edge, F&& f) {
    if (edge.s && edge.a) f(std::true_type{}, std::true_type{});
    else if (edge.a) f(std::false_type{}, std::true_type{});
    else if (edge.s) f(std::true_type{}, std::false_type{});
    else f(std::false_type{}, std::false_type{});
}

template <bool kScaled, bool kCentred, class T, class Lanes>
BNR_INLINE vf output_gradient(const T* p, const T* y, const OutputEdge& edge, int64_t c, Lanes lanes) {
    vf v = load(p + c, lanes);
    if constexpr (kScaled) v = v * load(edge.s + c, lanes);
    if constexpr (kCentred) {
        const vf offset = load(y + c, lanes) - load(edge.mean + c, lanes);
        v = v + fma(load(edge.a + c, lanes), offset, load(edge.b + c, lanes));
    }
    return v;
}

}  // namespace

InputTransform transform_at(const Problem& p, int64_t image, int64_t channel) {
    const bool affine = p.mean != nullptr;
    return {affine ? p.mean + channel : nullptr, affine ? p.scale + channel : nullptr,
            affine ? p.beta + channel : nullptr,
            Activation{static_cast<Act>(p.activation), static_cast<float>(p.slope)},
            p.gate ? p.gate + image * p.in_channels + channel : nullptr};
}

template <class T, class Out>
void transform_pixels(const T* x, int64_t ldx, int64_t pixels, int64_t channels, const InputTransform& t, Out* z,
                      int64_t ldz) {
    if (t.is_identity() && ldx == channels && ldz == channels && std::is_same_v<T, Out>) {
        std::memcpy(z, x, static_cast<std::size_t>(pixels * channels) * sizeof(T));
        return;
    }
    with_activation(t.act.kind, [&](auto act) {
        constexpr Act A = decltype(act)::value;
        if (t.mean && t.gate) transform_run<A, true, true>(x, ldx, pixels, channels, t, z, ldz);
        else if (t.mean) transform_run<A, true, false>(x, ldx, pixels, channels, t, z, ldz);
        else if (t.gate) transform_run<A, false, true>(x, ldx, pixels, channels, t, z, ldz);
        else transform_run<A, false, false>(x, ldx, pixels, channels, t, z, ldz);
    });
}

template <class T, class Out>
void output_gradient_pixels(const T* p, int64_t ldp, const T* y, int64_t ldy, int64_t pixels, int64_t channels,
                            const OutputEdge& edge, float factor, Out* d, int64_t ldd) {
    with_edge(edge, [&](auto scaled, auto centred) {
        for (int64_t i = 0; i < pixels; i++) {
            Out* to = d + i * ldd;
            for_each_vector(channels, [&](int64_t c, auto lanes) {
                const vf v = output_gradient<scaled.value, centred.value>(p + i * ldp, y + i * ldy, edge, c, lanes);
                put<T>(to + c, v * set1(factor), lanes);
            });
            put_partner(to, channels, ldd);
        }
    });
}

template <class T>
void add_output_gradient(const T* p, int64_t ldp, const T* y, int64_t ldy, int64_t pixels, int64_t channels,
                         const OutputEdge& edge, float* sum) {
    with_edge(edge, [&](auto scaled, auto centred) {
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            for (int64_t begin = 0; begin < pixels; begin += kFew) {
                vf s = zero();
                for (int64_t i = begin; i < std::min(pixels, begin + kFew); i++) {
                    s = s + output_gradient<scaled.value, centred.value>(p + i * ldp, y + i * ldy, edge, c, lanes);
                }
                store(sum + c, load(sum + c) + s);
            }
        });
    });
}

template <class T>
void input_gradient_pixels(const float* g, int64_t ldg, const T* x, int64_t ldx, int64_t pixels, int64_t channels,
                           const InputTransform& t, float factor, T* dx, int64_t lddx, bool accumulate, float* sum_p,
                           float* sum_px) {
    with_activation(t.act.kind, [&](auto act) {
        constexpr Act A = decltype(act)::value;
        if (t.mean) {
            input_gradient_run<A, true>(g, ldg, x, ldx, pixels, channels, t, factor, dx, lddx, accumulate, sum_p, sum_px);
        } else {
            input_gradient_run<A, false>(g, ldg, x, ldx, pixels, channels, t, factor, dx, lddx, accumulate, sum_p, sum_px);
        }
    });
}

template <class T>
void gated_gradient_pixels(const float* g, int64_t ldg, const T* x, int64_t ldx, int64_t pixels, int64_t channels,
                           const InputTransform& t, float factor, T* dx, int64_t lddx, bool accumulate, float* sum_gate) {
    with_activation(t.act.kind, [&](auto act) {
        constexpr Act A = decltype(act)::value;
        if (t.mean) gated_gradient_run<A, true>(g, ldg, x, ldx, pixels, channels, t, factor, dx, lddx, accumulate, sum_gate);
        else gated_gradient_run<A, false>(g, ldg, x, ldx, pixels, channels, t, factor, dx, lddx, accumulate, sum_gate);
    });
}

template <class T>
void finish_output_pixels(const float* c, int64_t ldc, int64_t pixels, int64_t channels, const float* bias, T* y,
                          int64_t ldy) {
    for (int64_t i = 0; i < pixels; i++) {
        for_each_vector(channels, [&](int64_t j, auto lanes) {
            vf v = load(c + i * ldc + j, lanes);
            if (bias) v = v + load(bias + j, lanes);
            store(y + i * ldy + j, v, lanes);
        });
    }
}

template <class T>
void finish_output_pixels(const float* c, int64_t ldc, int64_t pixels, int64_t channels, const float* bias, T* y, int64_t ldy,
                          const float* shift, float* sum, float* square) {
    for (int64_t begin = 0; begin < pixels; begin += kFew) {
        const int64_t end = std::min(pixels, begin + kFew);
        for_each_vector(channels, [&](int64_t j, auto lanes) {
            const vf b = bias ? load(bias + j, lanes) : zero(), k = load(shift + j);
            vf s = zero(), q = zero();
            for (int64_t i = begin; i < end; i++) {
                const vf v = load(c + i * ldc + j, lanes) + b;
                store(y + i * ldy + j, v, lanes);
                const vf d = stored<T>(v) - k;
                s = s + d;
                q = fma(d, d, q);
            }
            store(sum + j, load(sum + j) + s);
            store(square + j, load(square + j) + q);
        });
    }
}

#define BNR_FOR(T, Out)                                                                                               \
    template void transform_pixels(const T*, int64_t, int64_t, int64_t, const InputTransform&, Out*, int64_t);        \
    template void output_gradient_pixels(const T*, int64_t, const T*, int64_t, int64_t, int64_t, const OutputEdge&,   \
                                         float, Out*, int64_t);
BNR_FOR(float, float)
BNR_FOR(bf16, float)
BNR_FOR(bf16, bf16)
#undef BNR_FOR
#define BNR_FOR(T)                                                                                                    \
    template void add_output_gradient(const T*, int64_t, const T*, int64_t, int64_t, int64_t, const OutputEdge&,      \
                                      float*);                                                                        \
    template void input_gradient_pixels(const float*, int64_t, const T*, int64_t, int64_t, int64_t,                   \
                                        const InputTransform&, float, T*, int64_t, bool, float*, float*);             \
    template void gated_gradient_pixels(const float*, int64_t, const T*, int64_t, int64_t, int64_t,                   \
                                        const InputTransform&, float, T*, int64_t, bool, float*);                     \
    template void finish_output_pixels(const float*, int64_t, int64_t, int64_t, const float*, T*, int64_t);            \
    template void finish_output_pixels(const float*, int64_t, int64_t, int64_t, const float*, T*, int64_t,            \
                                       const float*, float*, float*);
BNR_FOR(float)
BNR_FOR(bf16)
#undef BNR_FOR

}  // namespace bnr::conv
