"""The factor of a squeeze-and-excitation: as kernels take it, or, where it has another shape or dtype, as PyTorch multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import Transform, accumulation_dtype
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import NormaliseForward
from bnrestructure.kernels.operands import readable

__all__ = ["gated_operand", "is_by_channel", "with_gate"]


def with_gate(x: Tensor, transform: Transform, backend: str, *, casts: bool = False) -> tuple[Tensor, Transform]:
    """(x, the transform, its gate [N, C] in the accumulation dtype), or (the product in memory, nothing to apply).

    ``transform.gate`` is what a graph multiplies z by, of any shape that PyTorch's product takes; x [N, C, *spatial] is what a squeeze
    has deferred. ``casts``: the reader takes a gate of any dtype, for it casts what it reads.
    """
    assert transform.gate is not None
    gate = readable(transform.gate)
    if is_by_channel(x, gate, casts=casts):
        return x, transform._replace(gate=gate.reshape(x.shape[:2]).to(accumulation_dtype(x.dtype)))
    return _StandsForZ.apply(x, *transform[:4], backend) * gate, Transform()


def gated_operand(y: Tensor, transform: Transform, backend: str) -> tuple[Tensor, Transform]:
    """The same for an operand of a residual join, whose activation, the sum's, stays in the transform."""
    y, gated = with_gate(y, transform._replace(act="identity"), backend)
    return y, gated._replace(act=transform.act)


def is_by_channel(x: Tensor, gate: Tensor, *, casts: bool = False) -> bool:
    """Whether kernels know this gate: one factor a channel of each image, [N, C, 1, ...], that leaves x's dtype as it is."""
    by_channel = x.dim() > 2 and gate.shape == (*x.shape[:2], *[1] * (x.dim() - 2))
    return by_channel and (casts or gate.dtype is x.dtype or torch.promote_types(x.dtype, gate.dtype) is x.dtype)


class _StandsForZ(torch.autograd.Function):
    """z itself, of a deferred x: the gradient at z is what the squeeze wants of its reader."""

    @staticmethod
    def forward(ctx: Any, x: Any, mean: Any, scale: Any, beta: Any, act: str, backend: str) -> Any:
        return registry.run(backend, NormaliseForward(x, Transform(mean, scale, beta, act), x.dtype))

    @staticmethod
    def backward(ctx: Any, dz: Any) -> Any:
        return dz, None, None, None, None, None
