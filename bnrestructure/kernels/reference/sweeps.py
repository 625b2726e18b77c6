"""The sweeps that ride on no convolution: normalise, residual join, max pooling, squeeze (global average)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.activation import activate, activation_gradient
from bnrestructure.core.edges import accumulation_dtype, per_channel
from bnrestructure.kernels.calls import (
    Call,
    JoinBackward,
    JoinForward,
    JoinGradients,
    JoinResult,
    MaxPoolBackward,
    MaxPoolForward,
    MaxPoolResult,
    NormaliseBackward,
    NormaliseForward,
    SqueezeBackward,
    SqueezeForward,
    StatisticsForward,
    SweepGradients,
)
from bnrestructure.kernels.reference.elementwise import affine, apply_transform, channel_sum, gated, input_gradient, joined, write
from bnrestructure.kernels.reference.statistics import statistics_forward
from bnrestructure.kernels.rounding import dithered

__all__ = ["RUN", "join_backward", "join_forward"]


def normalise_forward(call: NormaliseForward) -> Tensor:
    """``z = act((x - mean) * scale + beta) * gate + r``."""
    if call.r is None:
        z = apply_transform(call.x, call.transform, call.dtype)
    else:
        exact = accumulation_dtype(call.x.dtype)
        z = (apply_transform(call.x, call.transform, exact) + call.r.to(exact)).to(call.dtype)
    return z if call.out is None else call.out.copy_(z)


def normalise_backward(call: NormaliseBackward) -> SweepGradients:
    """The gradient at x, and the sums over pixels of the gradient at the transform."""
    x, transform = call.x, call.transform
    dz = call.dz if call.factor == 1 else call.dz.to(accumulation_dtype(x.dtype)) * call.factor
    if call.factors is not None:
        dz = dz.to(call.factors.dtype) * call.factors.reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    if transform.gate is not None:
        dx, dgate = gated(dz, x, transform)
        return SweepGradients(write(dx, x.dtype, call.accumulate), None, None, dgate)
    dx, sum_p, sum_px = input_gradient(dz, x, transform)
    return SweepGradients(write(dx, x.dtype, call.accumulate), sum_p, sum_px)


def join_forward(call: JoinForward) -> JoinResult:
    """``act(u + r)``: the sum of two transformed tensors, and its statistics where they are wanted."""
    z = activate(joined(call.join), call.join.act).to(call.dtype)
    if call.out is not None:
        z = call.out.copy_(z)
    mean, var = statistics_forward(StatisticsForward(z)) if call.statistics else (None, None)
    return JoinResult(z, mean, var)


def join_backward(call: JoinBackward) -> JoinGradients:
    """The gradient at the join's sum, times the activation's derivative, and the sums over pixels for both operands."""
    join, z = call.join, call.z
    y, ty, r, tr = join.y, join.ty, join.r, join.tr
    dtype = y.dtype if z is None else z.dtype
    acc = accumulation_dtype(dtype)
    g = call.dz.to(acc)
    if call.factor != 1:
        g = g * call.factor
    if call.accumulate is not None:
        g = g + call.accumulate.to(acc)
    if call.statistics is not None:
        assert z is not None
        a, b, mean = call.statistics
        g = g + per_channel(a, z) * (z.to(acc) - per_channel(mean, z)) + per_channel(b, z)
    g = activation_gradient(g, joined(join), join.act)
    spy = channel_sum(g * (y.to(acc) - per_channel(ty.mean, y))) if ty.gives_sums else None
    spr = None if tr.mean is None else channel_sum(g * (r.to(acc) - per_channel(tr.mean, r)))
    stored = g.to(dtype) if call.statistics is None else dithered(g, dtype)
    return JoinGradients(stored, channel_sum(g), spy, spr)


def max_pool_forward(call: MaxPoolForward) -> MaxPoolResult:
    """The maxima of the transformed input, and where in each window the first of them is."""
    x = call.x
    z = apply_transform(x, call.transform, call.dtype)
    (kh, kw), (sh, sw), (ph, pw), ceil = call.geometry
    y, flat = F.max_pool2d(z, (kh, kw), (sh, sw), (ph, pw), ceil_mode=ceil, return_indices=True)
    rows = torch.arange(y.shape[2], device=x.device).view(-1, 1) * sh - ph
    columns = torch.arange(y.shape[3], device=x.device) * sw - pw
    width = x.shape[3]
    index = (flat // width - rows) * kw + (flat % width - columns)
    return MaxPoolResult(y, index.to(torch.uint8))


def max_pool_backward(call: MaxPoolBackward) -> SweepGradients:
    """The gradient at x, which gathers that of every window whose maximum a pixel was."""
    x, dy = call.x, call.dy
    (_, kw), (sh, sw), (ph, pw), _ = call.geometry
    rows = torch.arange(dy.shape[2], device=x.device).view(-1, 1) * sh - ph
    columns = torch.arange(dy.shape[3], device=x.device) * sw - pw
    position = call.index.to(torch.int64)
    flat = (rows + position // kw) * x.shape[3] + columns + position % kw
    acc = accumulation_dtype(x.dtype)
    g = torch.zeros(*x.shape[:2], x.shape[2] * x.shape[3], dtype=acc, device=x.device)
    g.scatter_add_(2, flat.flatten(2), dy.to(acc).flatten(2))
    in_format = torch.empty_like(x, dtype=acc).copy_(g.view(x.shape))
    dx, sum_p, sum_px = input_gradient(in_format, x, call.transform)
    return SweepGradients(write(dx, x.dtype, call.accumulate), sum_p, sum_px)


def squeeze_forward(call: SqueezeForward) -> Tensor:
    """The average over the pixels of the transformed input, [N, C]."""
    return activate(affine(call.x, call.transform), call.transform.act).flatten(2).mean(2).to(call.dtype)


def squeeze_backward(call: SqueezeBackward) -> SweepGradients:
    """The gradient at x of the average, with that of the other readers of z where it is given."""
    x, dz, accumulate, dpooled = call.x, call.dz, call.accumulate, call.dpooled
    acc = accumulation_dtype(x.dtype)
    positions = x.shape[2:].numel()
    g = (dpooled.to(acc) / positions).view(*dpooled.shape, *([1] * (x.dim() - 2))).expand(x.shape)
    if dz is not None:
        g = g + dz.to(acc)
    dx, sum_p, sum_px = input_gradient(g, x, call.transform)
    # All pixels of an image have the same share of the average's gradient, and would be rounded alike.
    if accumulate is None:
        return SweepGradients(dithered(dx, x.dtype), sum_p, sum_px)
    total = dx if accumulate is dz else dx + accumulate.to(acc)
    return SweepGradients(accumulate.copy_(dithered(total, accumulate.dtype)), sum_p, sum_px)


#: What answers each call.
RUN: dict[type[Call[Any]], Callable[[Any], Any]] = {
    NormaliseForward: normalise_forward,
    NormaliseBackward: normalise_backward,
    JoinForward: join_forward,
    JoinBackward: join_backward,
    MaxPoolForward: max_pool_forward,
    MaxPoolBackward: max_pool_backward,
    SqueezeForward: squeeze_forward,
    SqueezeBackward: squeeze_backward,
}
