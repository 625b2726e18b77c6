"""Where a region's tensors meet code that is not ours: the user's modules and callers see what eager would give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["eager_format", "order_of", "returned"]


def order_of(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """A tensor's dimensions in the order that they have in memory, outermost first.

    A dimension of size 1 has no stride that means anything: it stands before the one that follows it in the shape.
    """
    strides = list(stride)
    for d in reversed(range(len(shape))):
        if shape[d] == 1 and d + 1 < len(shape):
            strides[d] = max(strides[d], strides[d + 1])
    return tuple(sorted(range(len(shape)), key=lambda d: (-strides[d], d)))


def eager_format(x: object, order: tuple[int, ...]) -> object:
    """``x`` with its dimensions in this order in memory; itself where they are, or where it is no tensor of as many dimensions."""
    if not isinstance(x, Tensor) or x.dim() != len(order) or x.layout is not torch.strided:
        return x
    if x.permute(order).is_contiguous() or order_of(x.shape, x.stride()) == order:  # a slice stays the view that it is
        return x
    expanded = [d for d in range(x.dim()) if x.stride(d) == 0 and x.shape[d] > 1]
    if expanded:
        read = x[tuple(slice(0, 1) if d in expanded else slice(None) for d in range(x.dim()))]
        return _copied(read, order).expand(x.shape)
    return _copied(x, order)


def _copied(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """A copy laid out so, and no view: a caller may detach such a tensor in place, and write to it once it has a hook."""
    return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device).copy_(x)


def returned(x: object) -> object:
    """``x``, which the caller gets: hooks on it and ``torch.autograd.grad()`` see all of its gradient, and none where there is none.

    A tensor with a place of its own in autograd's graph, not a view: the caller may detach it in place. It shares x's version, so that a
    node which kept x notices an edit.
    """
    return _Returned.apply(x) if isinstance(x, Tensor) and x.requires_grad else x


class _Returned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return gradient
