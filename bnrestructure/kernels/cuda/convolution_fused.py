"""The convolution fused whole: prologue, product and epilogue in one kernel each way; dense or depthwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.kernels.cuda import (
    dense_dgrad,
    dense_forward,
    dense_wgrad,
    depthwise_dgrad,
    depthwise_forward,
    depthwise_wgrad,
)
from bnrestructure.kernels.cuda.edges import edge_pixels

__all__ = ["conv_backward", "conv_forward"]


def conv_forward(
    x: Tensor, transform: Transform, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var): see kernels/reference/convolution.py. x [N, C_in, H, W] of any strides; fp32, bf16 or fp16."""
    module = depthwise_forward if geometry.is_depthwise(weight.shape) else dense_forward
    return module.conv_forward(x, transform, weight, bias, geometry, **options)


def conv_backward(
    dy: Tensor,
    edge: BackwardEdge,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    accumulate: Tensor | None = None,
    join: Join | None = None,
) -> ConvGradients:
    """Gradients of :func:`conv_forward`: see kernels/reference/convolution.py. With ``join`` x is its sum; not for depthwise ones."""
    need_x, need_weight, need_bias = needs
    gradient = edge_pixels(dy, edge)
    own = geometry.is_depthwise(weight.shape)
    dw = db = None
    if need_weight or need_bias:
        dw, db = (depthwise_wgrad if own else dense_wgrad).wgrad(
            gradient, x, transform, weight, geometry, dtype=dtype, needs_bias=need_bias
        )
    if not need_x:
        return ConvGradients(weight=dw if need_weight else None, bias=db)
    options = {} if own else {"join": join}
    found = (depthwise_dgrad if own else dense_dgrad).dgrad(
        gradient, x, transform, weight, geometry, dtype=dtype, accumulate=accumulate, **options
    )
    return ConvGradients(found.dx, found.sum_p, found.sum_px, found.gate, dw if need_weight else None, db, found.sum_pr)
