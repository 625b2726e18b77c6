"""A residual join and the convolution that reads its sum: kernels/join.py says what is computed.

The fused kernel of a 1x1 convolution forms the sum in its prologue, and both the fused and the hybrid dgrad finish its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.kernels.cuda.convolution import conv_backward, conv_forward
from bnrestructure.kernels.cuda.layout import empty_pixels
from bnrestructure.kernels.join import JoinGradients

__all__ = ["join_backward", "join_forward"]


def join_forward(
    join: Join, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, *, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(z, out, mean, var): see kernels/join.py. The operands [N, C_in, H, W] are of any strides; fp32, bf16 or fp16."""
    z = empty_pixels(tuple(join.y.shape), dtype, join.device).tensor
    return z, *conv_forward(z, Transform(), weight, bias, geometry, dtype=dtype, join=join, **options)


def join_backward(
    dy: Tensor,
    edge: BackwardEdge,
    z: Tensor,
    join: Join,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    needs: tuple[bool, bool],
    **options: Any,
) -> JoinGradients:
    """(G, SP, SPY, SPR, dweight, dbias): see kernels/join.py."""
    found = conv_backward(dy, edge, z, Transform(), weight, geometry, needs=(True, *needs), join=join, **options)
    assert found.dx is not None
    assert found.sum_p is not None
    return found.dx, found.sum_p, found.sum_px, found.sum_pr, found.weight, found.bias
