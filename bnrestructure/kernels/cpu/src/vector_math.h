// exp and its relatives on vectors, to about one unit in the last place. NaN gives NaN.
#pragma once

#include "simd.h"

namespace bnr {

// Cody-Waite reduction to |r| <= ln(2)/2 and a polynomial of degree 6: relative error below 1e-7.
BNR_INLINE vf exp(vf x) {
    x = min(set1(104.0f), max(set1(-104.0f), x));  // beyond: infinity and zero already; a NaN passes through
    const vf n = round_even(x * set1(1.44269504088896341f));
    const vf r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
    vf p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    return scale2(p, n);
}

// s = 1 / (1 + exp(-x)) and `complement` = 1 - s, each without the cancellation of computing it from the other.
BNR_INLINE vf sigmoid(vf x, vf& complement) {
    const vf e = exp(min(x, -x)), larger = set1(1.0f) / (set1(1.0f) + e), smaller = e * larger;
    const vmask positive = x > zero();
    complement = select(positive, smaller, larger);
    return select(positive, larger, smaller);
}

// The cumulative distribution function of the standard normal, (1 + erf(x / sqrt 2)) / 2, without its cancellation for
// negative x. erfc(z) = t * exp(-z^2 + p(t)), t = 1 / (1 + z/2): the Chebyshev fit of Press et al., relative error 1.2e-7.
BNR_INLINE vf normal_cdf(vf x) {
    const vf z = max(x, -x) * set1(0.70710678118654752f);
    const vf t = set1(1.0f) / fma(z, set1(0.5f), set1(1.0f));
    vf p = set1(0.17087277f);
    p = fma(p, t, set1(-0.82215223f));
    p = fma(p, t, set1(1.48851587f));
    p = fma(p, t, set1(-1.13520398f));
    p = fma(p, t, set1(0.27886807f));
    p = fma(p, t, set1(-0.18628806f));
    p = fma(p, t, set1(0.09678418f));
    p = fma(p, t, set1(0.37409196f));
    p = fma(p, t, set1(1.00002368f));
    p = fma(p, t, set1(-1.26551223f));
    const vf upper = set1(0.5f) * t * exp(fma(x * set1(-0.5f), x, p));  // x^2 / 2, which is z^2 without z's rounding
    return select(x > zero(), set1(1.0f) - upper, upper);
}

}  // namespace bnr
