"""A residual join and the convolution that reads its sum, one after the other: see kernels/join.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bnrestructure.kernels import join, reference

__all__ = ["join_backward", "join_forward"]


def join_forward(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(z, out, mean, var)."""
    return join.join_forward(reference, *args, **options)


def join_backward(*args: Any, **options: Any) -> join.JoinGradients:
    """(G, SP, SPY, SPR, dweight, dbias)."""
    return join.join_backward(reference, *args, **options)
