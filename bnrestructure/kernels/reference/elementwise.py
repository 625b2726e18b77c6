"""The two edge formulas in plain PyTorch: what every prologue and epilogue is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from bnrestructure.core.activation import activate, activation_gradient
from bnrestructure.core.edges import BackwardEdge, Join, Transform, accumulation_dtype, per_channel

__all__ = ["affine", "apply_transform", "channel_sum", "gated", "input_gradient", "joined", "output_gradient", "write"]


def affine(x: Tensor, t: Transform) -> Tensor:
    """``u = (x - mean) * scale + beta`` in the accumulation dtype: the activation's input."""
    u = x.to(accumulation_dtype(x.dtype))
    if t.mean is None:
        return u
    return (u - per_channel(t.mean, x)) * per_channel(t.scale, x) + per_channel(t.beta, x)


def apply_transform(x: Tensor, t: Transform, dtype: torch.dtype) -> Tensor:
    """``z = act((x - mean) * scale + beta) * gate``, computed in the accumulation dtype and rounded once to ``dtype``."""
    if t.is_identity:
        return x.to(dtype)
    return _times_gate(activate(affine(x, t), t.act), t).to(dtype)


def _times_gate(z: Tensor, t: Transform) -> Tensor:
    return z if t.gate is None else z * t.gate.view(*t.gate.shape, *([1] * (z.dim() - 2)))


def joined(join: Join) -> Tensor:
    """A join's sum in the accumulation dtype: its activation's input."""
    return _times_gate(affine(join.y, join.ty), join.ty) + affine(join.r, join.tr)


def output_gradient(p: Tensor, edge: BackwardEdge) -> Tensor:
    """``dY = s * P + a * (y - mean) + b`` in the accumulation dtype."""
    d = p.to(accumulation_dtype(p.dtype))
    if edge.s is not None:
        d = d * per_channel(edge.s, p)
    if edge.a is not None and edge.y is not None:
        centred = edge.y.to(d.dtype) - per_channel(edge.mean, p)
        a, b = edge.factors
        d = d + per_channel(a, p) * centred + per_channel(b, p)
    return d


def channel_sum(x: Tensor) -> Tensor:
    """Sum over every dimension but the channel's, [C]."""
    return x.sum(dim=[d for d in range(x.dim()) if d != 1])


def input_gradient(g: Tensor, x: Tensor, t: Transform) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From ``g``, the gradient at z, to (gradient of raw x, SP, SPX). ``t.gate`` must already be folded into ``g``."""
    p = activation_gradient(g.to(accumulation_dtype(x.dtype)), affine(x, t), t.act)
    if t.mean is None:
        return p, None, None
    centred = x.to(p.dtype) - per_channel(t.mean, x)
    return p * per_channel(t.scale, x), channel_sum(p), channel_sum(p * centred)


def gated(g: Tensor, x: Tensor, t: Transform) -> tuple[Tensor, Tensor]:
    """From ``g``, the gradient at z, to (that at the gate's input, the gate's [N, C])."""
    assert t.gate is not None
    gate = t.gate.view(*t.gate.shape, *([1] * (x.dim() - 2)))
    ungated = apply_transform(x, Transform(t.mean, t.scale, t.beta, t.act), gate.dtype)
    return g.to(gate.dtype) * gate, (g.to(gate.dtype) * ungated).flatten(2).sum(2)


def write(value: Tensor, dtype: torch.dtype, accumulate: Tensor | None) -> Tensor:
    """``value`` rounded to ``dtype``, or added in place to ``accumulate`` when there is one."""
    if accumulate is None:
        return value.to(dtype)
    return accumulate.add_(value.to(accumulate.dtype))
