"""A residual join and the convolution that reads its sum: kernels/join.py says what is computed.

Backward, every dense implementation finishes the join in its dgrad's epilogue. Forward, the fused kernel of a 1x1 convolution forms the
sum tile by tile in front of its product; larger kernels would form it again where tiles overlap, so there the two run one after the
other. So they do at depthwise convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels import cpu, tuning
from bnrestructure.kernels import join as in_turn
from bnrestructure.kernels.cpu import convolution, convolution_fused

__all__ = ["join_backward", "join_forward"]


def join_forward(
    join: Join, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, *, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(z, out, mean, var): see kernels/join.py. All tensors are in ``dtype``."""
    if not _forms_sum(join.y, weight, geometry, dtype):
        return in_turn.join_forward(cpu, join, weight, bias, geometry, dtype=dtype, **options)
    z = kept_activation(join.y.shape, dtype, join.device)
    return z, *convolution_fused.conv_forward(z, Transform(), weight, bias, geometry, dtype=dtype, join=join, **options)


def _forms_sum(y: Tensor, weight: Tensor, geometry: ConvGeometry, dtype: torch.dtype) -> bool:
    """Whether the fused forward kernel runs this node and each pixel is in one of its tiles alone."""
    if not geometry.is_pointwise(weight.shape) or geometry.is_depthwise(weight.shape) or tuning.is_measuring():
        return False
    return convolution.choice(y, Transform(), weight, geometry, dtype, "forward").implementation == "fused"


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
) -> in_turn.JoinGradients:
    """(G, SP, SPY, SPR, dweight, dbias): see kernels/join.py. All tensors are in one dtype."""
    if geometry.is_depthwise(weight.shape):
        return in_turn.join_backward(cpu, dy, edge, z, join, weight, geometry, needs=needs, **options)
    found = convolution.conv_backward(dy, edge, z, Transform(), weight, geometry, needs=(True, *needs), join=join, **options)
    assert found.dx is not None
    assert found.sum_p is not None
    return found.dx, found.sum_p, found.sum_px, found.sum_pr, found.weight, found.bias
