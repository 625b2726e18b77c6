"""From a fused node to a kernel: compute dtype, implementation, and the guard that every node's backward shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.errors import UnexpectedTensorError
from bnrestructure.kernels import reference, registry
from bnrestructure.kernels.operands import require_memory_of_all

__all__ = ["call_kernel", "compute_dtype", "guard_second_derivative", "in_format_of"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a node computes and stores in: autocast's where it applies (never to float64), else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def call_kernel(backend: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Run kernel ``name`` of the implementation chosen for these arguments (see kernels/registry.py).

    Kernels do their own casting, so autocast is off inside them.
    """
    kernel: Callable[..., Any] = registry.select(backend, name, args, kwargs)
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return _run(kernel, name, device, args, kwargs)
    torch.set_autocast_enabled(device, False)  # a torch.autocast block costs ten times as much, a thousand times a step
    try:
        return _run(kernel, name, device, args, kwargs)
    finally:
        torch.set_autocast_enabled(device, True)


def _run(kernel: Callable[..., Any], name: str, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The kernel on these arguments; the reference where it meets a tensor that it does not expect."""
    plain = getattr(reference, name)
    if kernel is not plain:
        try:
            return kernel(*args, **kwargs)
        except UnexpectedTensorError:
            pass
    require_memory_of_all((*args, *kwargs.values()), device)
    return plain(*args, **kwargs)


def in_format_of(x: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient of x laid out as x is, where x is contiguous: kernels answer in channels_last.

    A batch norm that was left alone may have made x. PyTorch's backward of one, given x in one format and the gradient in another,
    is slower, and in bf16 less exact, than with the single format that eager gives it.
    """
    return gradient.contiguous() if gradient is not None and x.is_contiguous() else gradient


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on gradients whose own derivative is an error: kernels write gradients in place, so there is none to give."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.clone() for g in gradients)  # not views: the threads go on adding to them in place

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
