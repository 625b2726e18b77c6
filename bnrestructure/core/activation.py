"""The activations a convolution's prologue can apply, and their derivatives.

One string names an activation everywhere (graphs, schemas, kernels, plans): ``identity``, ``relu``, ``relu6``,
``silu``, ``hardswish``, ``gelu``, ``gelu_tanh`` and ``leaky_relu(SLOPE)``. The derivative is evaluated at the
activation's *input*, recomputed in backward with the expression that forward used, so that forward and backward agree
on which side of a kink every value lies.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "PLAIN_ACTIVATIONS",
    "activate",
    "activation_gradient",
    "is_homogeneous",
    "leaky_relu_name",
    "negative_slope",
    "unsupported_activation",
]

aten = torch.ops.aten

#: Activations without a parameter. ``leaky_relu(SLOPE)`` is the one that has one.
PLAIN_ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh")

_LEAKY = re.compile(r"leaky_relu\(([^)]+)\)")


def leaky_relu_name(slope: float) -> str:
    """The name under which LeakyReLU with this negative slope is known."""
    return f"leaky_relu({float(slope)!r})"


def negative_slope(act: str) -> float:
    """The negative slope in a ``leaky_relu(SLOPE)`` name. Raises ValueError for any other name."""
    match = _LEAKY.fullmatch(act)
    if match is None:
        raise ValueError(f"unknown activation {act!r}")
    return float(match.group(1))


def is_homogeneous(act: str) -> bool:
    """Whether ``act(k * u) == k * act(u)`` for every k > 0."""
    return act in ("identity", "relu") or _LEAKY.fullmatch(act) is not None


def unsupported_activation(act: str) -> str | None:
    """Why no kernel can apply an activation of this name, or None."""
    if act in PLAIN_ACTIVATIONS:
        return None
    try:
        negative_slope(act)
    except ValueError as error:
        return str(error)
    return None


def activate(u: Tensor, act: str) -> Tensor:
    """``act(u)``, elementwise, in u's dtype. NaNs propagate as PyTorch's own activations propagate them."""
    match act:
        case "identity":
            return u
        case "relu":
            return F.relu(u)
        case "relu6":
            return F.relu6(u)
        case "silu":
            return F.silu(u)
        case "hardswish":
            return F.hardswish(u)
        case "gelu":
            return F.gelu(u)
        case "gelu_tanh":
            return F.gelu(u, approximate="tanh")
        case _:
            return F.leaky_relu(u, negative_slope(act))


def activation_gradient(gradient: Tensor, u: Tensor, act: str) -> Tensor:
    """``gradient * act'(u)``: PyTorch's own backward formulas, kinks and NaNs included. Same shape and dtype as u."""
    match act:
        case "identity":
            return gradient
        case "relu":
            return aten.threshold_backward(gradient, u, 0)
        case "relu6":
            return aten.hardtanh_backward(gradient, u, 0.0, 6.0)
        case "silu":
            return aten.silu_backward(gradient, u)
        case "hardswish":
            return aten.hardswish_backward(gradient, u)
        case "gelu":
            return aten.gelu_backward(gradient, u)
        case "gelu_tanh":
            return aten.gelu_backward(gradient, u, approximate="tanh")
        case _:
            return aten.leaky_relu_backward(gradient, u, negative_slope(act), False)
