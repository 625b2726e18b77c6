"""Concat buffers: segments written in place, gradients handed down as slices of one tensor (inter-composite fusion, ICF)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.aliases import channel_slice, channels_last_buffer
from bnrestructure.core.edges import accumulation_dtype
from bnrestructure.core.kept import kept_activation
from bnrestructure.ops.dispatch import compute_dtype, guard_second_derivative

__all__ = ["UnchangedOutputs", "concat_buffer", "own_gradient", "unchanged"]


def concat_buffer(
    x: Tensor,
    *,
    into: Tensor | None = None,
    offset: int = 0,
    channels: int = 0,
    extra: int = 0,
    visible: int | None = None,
    own: bool = False,
) -> Tensor:
    """Copy x [N, C, *spatial] into channels ``[offset, offset + C)`` of a concat buffer and return its first ``visible`` channels.

    Without ``into`` a buffer of ``channels`` channels is made, or of ``C + extra`` when ``extra`` is given. ``visible`` None means up to
    and including x's channels when the buffer is new and ``extra`` is given, and the whole buffer otherwise. With ``own`` the gradient of
    x is a copy, to which the readers before this one in a chain may add; else it is a slice of the buffer's.
    """
    return _ConcatBuffer.apply(x, into, offset, channels, extra, visible, own)


class _ConcatBuffer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, into: Tensor | None, offset: int, channels: int, extra: int, visible: int | None, own: bool
    ) -> Tensor:
        count = x.shape[1]
        ctx.offset, ctx.channels, ctx.dtype, ctx.own = offset, count, x.dtype, own
        ctx.into_channels = None if into is None else into.shape[1]
        ctx.set_materialize_grads(False)  # nobody reads the concat: no zeros for whom eager gives nothing
        if into is None:
            size = (x.shape[0], count + extra if extra else channels, *x.shape[2:])
            into = kept_activation(size, compute_dtype(x), x.device)  # what the convolutions will write
            if extra and visible is None:
                visible = count
        channel_slice(into, offset, count).copy_(x)
        return channel_slice(into, 0, into.shape[1] if visible is None else visible)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return (None,) * 7
        # With ``own`` a chain will add to dx. The buffer's gradient may be the caller's, and stays as it is.
        dx = gradient.narrow(1, ctx.offset, ctx.channels).to(ctx.dtype, copy=ctx.own)
        dinto = None if ctx.into_channels is None else gradient.narrow(1, 0, ctx.into_channels)
        return guard_second_derivative((dx, dinto, *[None] * 5))


class UnchangedOutputs(NamedTuple):
    """The vectors of an edge, each [C] in the accumulation dtype."""

    mean: Tensor
    scale: Tensor
    beta: Tensor


def unchanged(x: Tensor) -> UnchangedOutputs:
    """(mean, scale, beta), each [C], that leave x [N, C, *spatial] as it is: 0, 1 and 0.

    They stand for a segment without a batch norm where a concat is normalised as a whole.
    """
    zeros = x.new_zeros(x.shape[1], dtype=accumulation_dtype(x.dtype))
    return UnchangedOutputs(zeros, torch.ones_like(zeros), zeros)


def own_gradient(x: Tensor) -> Tensor:
    """Identity whose gradient arrives in fresh memory, so that the readers before it in a chain may accumulate in place."""
    return _OwnGradient.apply(x)


class _OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return None
        if gradient.dim() < 3:  # what a join broadcasts may be a number
            return guard_second_derivative((gradient.to(ctx.dtype, copy=True),))[0]
        n, c, *spatial = gradient.shape
        owned = channels_last_buffer((n, c, *spatial), ctx.dtype, gradient.device)
        return guard_second_derivative((owned.copy_(gradient),))[0]
