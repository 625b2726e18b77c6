// The activations a prologue applies and their derivatives, with PyTorch's formulas at kinks and for NaNs.
//
// activate<A>(u, slope)                 act(u)
// activate<A>(u, slope, state)          the same value, and in `state` what the derivative needs of it: u itself where
//                                       there is a kink, the derivative where act is smooth (one exponential serves both)
// pull_back<A>(g, state, slope)         g * act'(u)
//
// Forward and backward both compute u with affine() below, so they agree on which side of a kink a value lies.
// A is a compile-time Act; Act::any looks the activation up at run time and serves all but the hot ones.
#pragma once

#include "vector_math.h"

namespace bnr {

// The numbers cross the C ABI: keep them in step with ACTIVATIONS in kernels/cpu/elements.py.
enum class Act : int { identity, relu, relu6, silu, hardswish, gelu, gelu_tanh, leaky_relu, any };

struct Activation {
    Act kind;
    float slope;  // of leaky_relu, for negative inputs
};

// The activation's input.
BNR_INLINE vf affine(vf x, vf mean, vf scale, vf beta) { return fma(x - mean, scale, beta); }

namespace detail {

BNR_INLINE vf inner_gelu_tanh(vf u) {
    // tanh's form of gelu is u * sigmoid(w), w = 2 sqrt(2/pi) (u + 0.044715 u^3)
    return u * fma(u * u, set1(1.5957691216057308f * 0.044715f), set1(1.5957691216057308f));
}

// Act::any. Out of line: inlined, all activations together would be most of the library's code.
// (Templates of nothing, because they are defined in a header and "inline" would ask for the opposite.)
template <int = 0>
__attribute__((noinline)) vf activate_by_kind(vf u, Activation act, vf& state);
template <int = 0>
__attribute__((noinline)) vf pull_back_by_kind(vf g, vf state, Activation act);

}  // namespace detail

template <Act A>
BNR_INLINE vf activate(vf u, Activation act, vf& state) {
    const vf one = set1(1.0f);
    state = u;
    if constexpr (A == Act::identity) {
        return u;
    } else if constexpr (A == Act::relu) {
        return max(zero(), u);
    } else if constexpr (A == Act::relu6) {
        return min(set1(6.0f), max(zero(), u));
    } else if constexpr (A == Act::silu) {
        vf c;
        const vf s = sigmoid(u, c);
        state = s * fma(u, c, one);
        return u * s;
    } else if constexpr (A == Act::hardswish) {
        return u * min(set1(6.0f), max(zero(), u + set1(3.0f))) * set1(1.0f / 6.0f);
    } else if constexpr (A == Act::gelu) {
        const vf cdf = normal_cdf(u);
        const vf pdf = exp(u * u * set1(-0.5f)) * set1(0.39894228040143268f);
        state = fma(u, pdf, cdf);
        return u * cdf;
    } else if constexpr (A == Act::gelu_tanh) {
        vf c;
        const vf s = sigmoid(detail::inner_gelu_tanh(u), c);
        // Clamped so that the derivative's vanishing factor does not meet an infinity far out.
        const vf v = min(set1(1e3f), max(set1(-1e3f), u));
        const vf dw = fma(v * v, set1(3.0f * 1.5957691216057308f * 0.044715f), set1(1.5957691216057308f));
        state = fma(v * dw, s * c, s);
        return u * s;
    } else if constexpr (A == Act::leaky_relu) {
        return select(u > zero(), u, u * set1(act.slope));
    } else {
        return detail::activate_by_kind<>(u, act, state);
    }
}

template <Act A>
BNR_INLINE vf activate(vf u, Activation act) {
    vf state;
    return activate<A>(u, act, state);
}

template <Act A>
BNR_INLINE vf pull_back(vf g, vf state, Activation act) {
    if constexpr (A == Act::identity) {
        return g;
    } else if constexpr (A == Act::relu) {
        return select(state <= zero(), zero(), g);
    } else if constexpr (A == Act::relu6) {
        return select((state <= zero()) | (state >= set1(6.0f)), zero(), g);
    } else if constexpr (A == Act::silu || A == Act::gelu || A == Act::gelu_tanh) {
        return g * state;
    } else if constexpr (A == Act::hardswish) {
        const vf inside = g * fma(state, set1(1.0f / 3.0f), set1(0.5f));
        return select(state <= set1(-3.0f), zero(), select(state >= set1(3.0f), g, inside));
    } else if constexpr (A == Act::leaky_relu) {
        return select(state > zero(), g, g * set1(act.slope));
    } else {
        return detail::pull_back_by_kind<>(g, state, act);
    }
}

namespace detail {

template <int>
vf activate_by_kind(vf u, Activation act, vf& state) {
    switch (act.kind) {
        case Act::relu: return activate<Act::relu>(u, act, state);
        case Act::relu6: return activate<Act::relu6>(u, act, state);
        case Act::silu: return activate<Act::silu>(u, act, state);
        case Act::hardswish: return activate<Act::hardswish>(u, act, state);
        case Act::gelu: return activate<Act::gelu>(u, act, state);
        case Act::gelu_tanh: return activate<Act::gelu_tanh>(u, act, state);
        case Act::leaky_relu: return activate<Act::leaky_relu>(u, act, state);
        default: return activate<Act::identity>(u, act, state);
    }
}

template <int>
vf pull_back_by_kind(vf g, vf state, Activation act) {
    switch (act.kind) {
        case Act::relu: return pull_back<Act::relu>(g, state, act);
        case Act::relu6: return pull_back<Act::relu6>(g, state, act);
        case Act::silu:
        case Act::gelu:
        case Act::gelu_tanh: return pull_back<Act::silu>(g, state, act);
        case Act::hardswish: return pull_back<Act::hardswish>(g, state, act);
        case Act::leaky_relu: return pull_back<Act::leaky_relu>(g, state, act);
        default: return g;
    }
}

}  // namespace detail

// Calls f with the activation as a compile-time constant: f(act_constant<Act::relu>{}).
template <Act A>
struct act_constant {
    static constexpr Act value = A;
};

template <class F>
inline void with_activation(Act kind, F&& f) {
    switch (kind) {
        case Act::identity: return f(act_constant<Act::identity>{});
        case Act::relu: return f(act_constant<Act::relu>{});
        case Act::relu6: return f(act_constant<Act::relu6>{});
        case Act::silu: return f(act_constant<Act::silu>{});
        default: return f(act_constant<Act::any>{});
    }
}

// Calls f with a null pointer of the element type the number stands for: 0 float, 1 bf16 (see elements.py).
template <class F>
inline void with_element(int64_t code, F&& f) {
    if (code == 0) f((float*)nullptr);
    else f((bf16*)nullptr);
}

// The instance of a kernel for an element type and an activation, of f(type*, act_constant), which names them all. They have
// one signature: what is around a kernel (threads, tiles, scratch) is compiled once.
template <class F>
inline auto kernel_for(int64_t element, Act kind, F&& f) {
    decltype(f(static_cast<float*>(nullptr), act_constant<Act::any>{})) kernel = nullptr;
    with_element(element, [&](auto* type) { with_activation(kind, [&](auto act) { kernel = f(type, act); }); });
    return kernel;
}

}  // namespace bnr
