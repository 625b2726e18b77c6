"""The activations of core/activation.py on fp32 blocks: value and derivative, with PyTorch's conventions at kinks and
for NaN.

Forward and backward both take their argument from :func:`pre_activation`, whose multiply-add is explicit, so that the
compiler cannot contract it in one kernel and not in the other: both see the same side of every kink.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from bnrestructure.core.activation import PLAIN_ACTIVATIONS, negative_slope
from bnrestructure.kernels.cuda.precision import exponential, reciprocal

__all__ = ["activate", "activation_constants", "normalised", "pre_activation", "pull_back"]

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
_TANH_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(1.5957691216057308 * 0.044715)


def activation_constants(act: str) -> dict[str, Any]:
    """The compile-time arguments ACT and SLOPE of an activation's name. Raises ValueError for an unknown one."""
    if act in PLAIN_ACTIVATIONS:
        return {"ACT": act, "SLOPE": 0.0}
    return {"ACT": "leaky_relu", "SLOPE": negative_slope(act)}


@triton.jit
def normalised(x, mean, scale, beta):
    """``(x - mean) * scale + beta`` of blocks that broadcast, or x itself where they are None."""
    return tl.fma(x - mean, scale, tl.broadcast_to(beta, x.shape)) if mean is not None else x


@triton.jit
def pre_activation(x, mean_ptr, scale_ptr, beta_ptr, channel, valid):
    """``(x - mean) * scale + beta``, or x itself where the vectors are None.

    ``channel`` and ``valid`` broadcast over x. Where a channel is not ``valid`` the result is 0.
    """
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)
        scale = tl.load(scale_ptr + channel, mask=valid, other=0.0)
        beta = tl.load(beta_ptr + channel, mask=valid, other=0.0)
        u = tl.fma(x - mean, scale, beta)
    else:
        u = x
    return u


@triton.jit
def _sigmoid(w):
    """(sigmoid(w), 1 - sigmoid(w)) by one exponential that cannot overflow, the second without cancellation."""
    e = exponential(-tl.abs(w))
    large = reciprocal(1.0 + e)
    small = e * large
    return tl.where(w < 0.0, small, large), tl.where(w < 0.0, large, small)


@triton.jit
def _logistic(w):
    """sigmoid(w) alone: 0 below -88, where its product with w rounds to nothing."""
    return reciprocal(1.0 + exponential(-w))


@triton.jit
def _tanh_argument(u):
    """w such that gelu's tanh form is ``u * sigmoid(w)``."""
    return u * tl.fma(u * u, _TANH_CUBIC, _TANH_LINEAR)


@triton.jit
def activate(u, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """``act(u)``. Every activation maps 0 to 0, which the masked lanes of the convolutions rely on."""
    tl.static_assert(u.dtype == tl.float32)
    if ACT == "relu":
        z = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        z = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
        z = tl.minimum(z, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        z = u * _logistic(u)
    elif ACT == "hardswish":
        inside = tl.maximum(u + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        z = u * tl.minimum(inside, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    elif ACT == "gelu":
        z = 0.5 * u * (1.0 + tl.erf(u * _SQRT_HALF))
    elif ACT == "gelu_tanh":
        z = u * _logistic(_tanh_argument(u))
    elif ACT == "leaky_relu":
        z = tl.where(u > 0.0, u, u * SLOPE)
    else:
        tl.static_assert(ACT == "identity")
        z = u
    return z


@triton.jit
def pull_back(g, u, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """``g * act'(u)``."""
    tl.static_assert(u.dtype == tl.float32)
    if ACT == "relu":
        p = tl.where(u <= 0.0, 0.0, g)
    elif ACT == "relu6":
        p = tl.where((u <= 0.0) | (u >= 6.0), 0.0, g)
    elif ACT == "silu":
        s, rest = _sigmoid(u)
        p = g * s * tl.fma(u, rest, 1.0)
    elif ACT == "hardswish":
        inside = g * tl.fma(u, 1.0 / 3.0, 0.5)
        p = tl.where(u <= -3.0, 0.0, tl.where(u < 3.0, inside, g))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(u * _SQRT_HALF))
        p = g * tl.fma(u, exponential(-0.5 * u * u) * _INVERSE_SQRT_TWO_PI, cdf)
    elif ACT == "gelu_tanh":
        s, rest = _sigmoid(_tanh_argument(u))
        # Far out the product of s and the rest is 0; u is clamped so that it does not meet an infinity there.
        v = tl.minimum(tl.maximum(u, -1e3), 1e3)
        slope = tl.fma(v * v, 3.0 * _TANH_CUBIC, _TANH_LINEAR)
        p = tl.where(u == u, g * tl.fma(v * slope, s * rest, s), u)
    elif ACT == "leaky_relu":
        p = tl.where(u > 0.0, g, g * SLOPE)
    else:
        tl.static_assert(ACT == "identity")
        p = g
    return p
