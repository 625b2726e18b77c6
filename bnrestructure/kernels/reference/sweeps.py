"""The sweeps that ride on no convolution: normalise, residual join, max pooling, squeeze (global average)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.activation import activate, activation_gradient
from bnrestructure.core.edges import PoolGeometry, Transform, accumulation_dtype, per_channel
from bnrestructure.kernels.reference.elementwise import affine, apply_transform, channel_sum, input_gradient, write
from bnrestructure.kernels.reference.statistics import statistics_forward
from bnrestructure.kernels.rounding import dithered

__all__ = [
    "max_pool_backward",
    "max_pool_forward",
    "normalise_backward",
    "normalise_forward",
    "residual_backward",
    "residual_forward",
    "squeeze_backward",
    "squeeze_forward",
]

Sums = tuple[Tensor, Tensor | None, Tensor | None]


def normalise_forward(x: Tensor, transform: Transform, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``z = act((x - mean) * scale + beta)`` in ``dtype``; written to ``out`` (any strides) when given."""
    z = apply_transform(x, transform, dtype)
    return z if out is None else out.copy_(z)


def normalise_backward(dz: Tensor, x: Tensor, transform: Transform, *, accumulate: Tensor | None = None) -> Sums:
    """(dx, SP, SPX) from the gradient at z; dx is added in place to ``accumulate`` when given."""
    dx, sum_p, sum_px = input_gradient(dz, x, transform)
    return write(dx, x.dtype, accumulate), sum_p, sum_px


def residual_forward(
    y: Tensor, ty: Transform, r: Tensor, tr: Transform, act: str, *, dtype: torch.dtype, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``out = act(ty(y) + tr(r))`` in ``dtype``, and its statistics if asked for. ty and tr are affine (their act is identity)."""
    out = activate(affine(y, ty) + affine(r, tr), act).to(dtype)
    mean, var = statistics_forward(out) if statistics else (None, None)
    return out, mean, var


def residual_backward(
    dout: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor] | None,
    y: Tensor,
    ty: Transform,
    r: Tensor,
    tr: Transform,
    out: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(G, SP, SPY, SPR): G, in out's dtype, is the gradient at the sum, the P of *both* operands; SP = sum G.

    ``statistics`` = (a, b, mean): ``dout`` first gains ``a * (out - mean) + b``. SPY = sum G * (y - ty.mean), SPR the same for
    r; each None where that operand has no mean.
    """
    acc = accumulation_dtype(out.dtype)
    g = dout.to(acc)
    if statistics is not None:
        a, b, mean = statistics
        g = g + per_channel(a, out) * (out.to(acc) - per_channel(mean, out)) + per_channel(b, out)
    g = activation_gradient(g, affine(y, ty) + affine(r, tr), act)
    spy = None if ty.mean is None else channel_sum(g * (y.to(acc) - per_channel(ty.mean, y)))
    spr = None if tr.mean is None else channel_sum(g * (r.to(acc) - per_channel(tr.mean, r)))
    stored = g.to(out.dtype) if statistics is None else dithered(g, out.dtype)
    return stored, channel_sum(g), spy, spr


def max_pool_forward(
    x: Tensor, transform: Transform, geometry: PoolGeometry, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(max pool of transform(x), uint8 position of the maximum inside its window). 2-D only; at most 255 window positions.

    The position counts row by row through the kernel, padding included; on a tie the first is taken, as PyTorch does.
    """
    z = apply_transform(x, transform, dtype)
    (kh, kw), (sh, sw), (ph, pw), ceil = geometry
    y, flat = F.max_pool2d(z, (kh, kw), (sh, sw), (ph, pw), ceil_mode=ceil, return_indices=True)
    rows = torch.arange(y.shape[2], device=x.device).view(-1, 1) * sh - ph
    columns = torch.arange(y.shape[3], device=x.device) * sw - pw
    width = x.shape[3]
    index = (flat // width - rows) * kw + (flat % width - columns)
    return y, index.to(torch.uint8)


def max_pool_backward(
    dy: Tensor,
    index: Tensor,
    x: Tensor,
    transform: Transform,
    geometry: PoolGeometry,
    *,
    accumulate: Tensor | None = None,
) -> Sums:
    """(dx, SP, SPX) of :func:`max_pool_forward`."""
    (_, kw), (sh, sw), (ph, pw), _ = geometry
    rows = torch.arange(dy.shape[2], device=x.device).view(-1, 1) * sh - ph
    columns = torch.arange(dy.shape[3], device=x.device) * sw - pw
    position = index.to(torch.int64)
    flat = (rows + position // kw) * x.shape[3] + columns + position % kw
    acc = accumulation_dtype(x.dtype)
    g = torch.zeros(*x.shape[:2], x.shape[2] * x.shape[3], dtype=acc, device=x.device)
    g.scatter_add_(2, flat.flatten(2), dy.to(acc).flatten(2))
    dx, sum_p, sum_px = input_gradient(g.view(x.shape), x, transform)
    return write(dx, x.dtype, accumulate), sum_p, sum_px


def squeeze_forward(x: Tensor, transform: Transform, *, dtype: torch.dtype) -> Tensor:
    """Mean of ``transform(x)`` over the spatial positions, [N, C] in ``dtype``: global average pooling in one sweep."""
    return activate(affine(x, transform), transform.act).flatten(2).mean(2).to(dtype)


def squeeze_backward(
    dpooled: Tensor, dz: Tensor | None, x: Tensor, transform: Transform, *, accumulate: Tensor | None = None
) -> Sums:
    """(dx, SP, SPX). The gradient at z is ``dpooled[n, c] / positions + dz``; ``dz`` [N, C, *spatial] comes from the gated
    readers of the same z (see ops/squeeze.py) and may be the same tensor as ``accumulate``: then it is *overwritten*."""
    acc = accumulation_dtype(x.dtype)
    positions = x.shape[2:].numel()
    g = (dpooled.to(acc) / positions).view(*dpooled.shape, *([1] * (x.dim() - 2))).expand(x.shape)
    if dz is not None:
        g = g + dz.to(acc)
    dx, sum_p, sum_px = input_gradient(g, x, transform)
    # All pixels of an image have the same share of the average's gradient, and would be rounded alike.
    if accumulate is None:
        return dithered(dx, x.dtype), sum_p, sum_px
    total = dx if accumulate is dz else dx + accumulate.to(acc)
    return accumulate.copy_(dithered(total, accumulate.dtype)), sum_p, sum_px
