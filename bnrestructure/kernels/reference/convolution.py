"""The fused convolution, forward and backward, over ATen's convolution (1-D, 2-D and 3-D, any dtype and device)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Transform
from bnrestructure.kernels.aten_convolution import convolution_backward
from bnrestructure.kernels.reference.elementwise import (
    apply_transform,
    channel_sum,
    input_gradient,
    output_gradient,
    write,
)
from bnrestructure.kernels.reference.statistics import statistics_forward
from bnrestructure.kernels.rounding import gradient_factor, restored

__all__ = ["conv_backward", "conv_forward"]


def conv_forward(
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    statistics: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``y = conv(transform(x), weight) + bias`` and y's biased statistics.

    x [N, C_in, *spatial]; weight [C_out, C_in / groups, *kernel]; y [N, C_out, *spatial_out] in ``dtype``, written to
    ``out`` (any strides: a channel slice of a concat buffer) when given. mean and var are [C_out] of y *as stored*, in the
    accumulation dtype, or None without ``statistics``.
    """
    z = apply_transform(x, transform, dtype)
    bias = None if bias is None else bias.to(dtype)
    y = torch.convolution(z, weight.to(dtype), bias, *geometry.aten_arguments)
    if out is not None:
        y = out.copy_(y)
    mean, var = statistics_forward(y) if statistics else (None, None)
    return y, mean, var


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
) -> ConvGradients:
    """Gradients of :func:`conv_forward`. ``needs`` = (dx and the sums, weight, bias).

    ``dy`` [N, C_out, *spatial_out] is the edge's P, of any strides. ``accumulate``, of x's shape, is added to in place and
    returned as ``dx``; without it dx is fresh. See :class:`ConvGradients` for what comes back.
    """
    need_x, need_weight, need_bias = needs
    exact = output_gradient(dy, edge)
    factor = gradient_factor(edge.a is not None, dtype, exact.dtype)
    d = (exact if factor == 1 else exact * factor).to(dtype)
    z = apply_transform(x, transform, dtype) if need_weight or need_x else x
    g, dw = convolution_backward(d, z, weight.to(dtype), geometry, need_input=need_x, need_weight=need_weight)
    dw = None if dw is None else restored(dw, factor, weight.dtype)
    # Before rounding: that of a bias in front of a batch norm is zero, and what is rounded off would be all that is left of it.
    db = channel_sum(exact).to(dtype) if need_bias else None
    if g is None:
        return ConvGradients(weight=dw, bias=db)
    if factor != 1:
        g = restored(g, factor, exact.dtype)
    if transform.gate is not None:
        gate = transform.gate.view(*transform.gate.shape, *([1] * (x.dim() - 2)))
        ungated = apply_transform(x, Transform(transform.mean, transform.scale, transform.beta, transform.act), gate.dtype)
        dgate = (g.to(gate.dtype) * ungated).flatten(2).sum(2)
        return ConvGradients(dx=write(g.to(gate.dtype) * gate, x.dtype, accumulate), gate=dgate, weight=dw, bias=db)
    dx, sum_p, sum_px = (g, None, None) if transform.is_identity else input_gradient(g, x, transform)
    return ConvGradients(dx=write(dx, x.dtype, accumulate), sum_p=sum_p, sum_px=sum_px, weight=dw, bias=db)
