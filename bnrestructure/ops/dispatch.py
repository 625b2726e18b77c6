"""What every fused node needs around its kernels: the compute dtype, the gradient's format, the input that is passed on,
and the guard of its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.aliases import alias
from bnrestructure.kernels.unmerged import Unmerged

__all__ = ["compute_dtype", "guard_second_derivative", "in_format_of", "passed_on", "with_room"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a node computes and stores in: autocast's where it applies (never to float64), else x's own."""
    device = "cpu" if x.is_cpu else x.device.type  # the latter takes ten times as long
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def in_format_of(x: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient of x laid out as x is, where x is contiguous: kernels answer in channels_last.

    A batch norm that was left alone may have made x. PyTorch's backward of one, given x in one format and the gradient in another,
    is slower, and in bf16 less exact, than with the single format that eager gives it.
    """
    return gradient.contiguous() if gradient is not None and x.is_contiguous() else gradient


def passed_on(ctx: Any, x: Tensor) -> Tensor:
    """x, the first of a node's inputs, for its next reader.

    It needs a gradient where x does: the node's parameters would have all its outputs need one.
    """
    passed = alias(x)
    if not ctx.needs_input_grad[0]:
        ctx.mark_non_differentiable(passed)
    return passed


def with_room(unmerged: Unmerged) -> tuple[Tensor, Tensor, Unmerged]:
    """Memory for a mean and a variance, and what is to be merged into them."""
    room = unmerged.partial.new_empty(2, unmerged.partial.shape[2])
    return room[0], room[1], unmerged


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on gradients whose own derivative is an error: kernels write gradients in place, so there is none to give."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.clone() for g in gradients)  # not views: the chains go on adding to them in place

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "bnrestructure: a second derivative through a restructured model is not available; "
            "call bnrestructure.unrestructure(model) before using create_graph=True"
        )


def guard_second_derivative(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Under ``create_graph=True``, make differentiating these gradients again a clear error instead of a wrong number."""
    if not torch.is_grad_enabled():
        return gradients
    present = [g for g in gradients if g is not None]
    if not present:
        return gradients
    anchor = torch.zeros((), requires_grad=True)
    guarded = iter(_NoSecondDerivative.apply(anchor, *present))
    return tuple(None if g is None else next(guarded) for g in gradients)
