"""The dense or depthwise convolution as cuDNN's own, between Triton sweeps that apply the prologue and the epilogue.

Worth its extra passes over memory where the fused kernel's prologue costs more than they do; see convolution_choice.py.
The transformed input and the output gradient live in temporaries, and neither is kept for backward. On CPU tensors,
interpreted, the product is ATen's. A gate is not among what these sweeps can do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.edges import EdgePixels, edge_pixels, output_gradient
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import empty_pixels, packed_weight, pixels
from bnrestructure.kernels.cuda.merge import partial_sums
from bnrestructure.kernels.cuda.precision import in_units, offset, rounded_gradient
from bnrestructure.kernels.cuda.problem import unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels
from bnrestructure.kernels.cuda.residual import residual_backward
from bnrestructure.kernels.cuda.statistics import statistics_forward
from bnrestructure.kernels.cuda.sweeps import normalise_backward, normalise_forward
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
    """(y, mean, var) as kernels/reference says. x [N, C_in, H, W] of any strides; fp32, bf16 or fp16; no gate."""
    z = _transformed(x, transform, dtype)
    bias = None if bias is None else bias.to(dtype)
    y = pixels(torch.convolution(z, packed_weight(weight, dtype), bias, *geometry.aten_arguments)).tensor
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
    join: Join | None = None,
) -> ConvGradients:
    """The gradients as kernels/reference says, for a transform without a gate. With ``join`` x is its sum."""
    need_x, need_weight, need_bias = needs
    gradient = edge_pixels(dy, edge)
    factor = gradient_factor(gradient.a is not None, dtype, torch.float32)
    if edge.s is None and edge.a is None and dy.dtype == dtype and not need_bias:
        d, db = gradient.p.tensor, None
    else:
        d, db = _output_gradient(gradient, dtype, need_bias)
    z = _transformed(x, transform, dtype) if need_weight else pixels(x).tensor.to(dtype)
    if not (need_x or need_weight):
        return ConvGradients(bias=db)
    g, found, _ = torch.ops.aten.convolution_backward(
        d, z, packed_weight(weight, dtype), None, *geometry.aten_arguments, [need_x, need_weight, False]
    )
    dw = torch.empty_like(weight).copy_(restored(found, factor, weight.dtype)) if need_weight else None
    if not need_x:
        return ConvGradients(weight=dw, bias=db)
    if join is not None:
        joined = residual_backward(g, None, *join.operands[:-1], x, join.act, factor=1 / factor, more=accumulate)
        return ConvGradients(*joined[:3], None, dw, db, joined[3])
    if transform.is_identity and factor == 1:
        dx = pixels(g).tensor.to(x.dtype) if accumulate is None else accumulate.add_(g)
        return ConvGradients(dx, weight=dw, bias=db)
    dx, sum_p, sum_px = normalise_backward(g, x, transform, accumulate=accumulate, factor=1 / factor)
    return ConvGradients(dx, sum_p, sum_px, None, dw, db)


def _transformed(x: Tensor, transform: Transform, dtype: torch.dtype) -> Tensor:
    """The convolution's real input, channels_last in ``dtype``; x itself where there is nothing to apply."""
    if transform.is_identity:
        return pixels(x).tensor.to(dtype)
    return normalise_forward(x, transform, dtype=dtype)


@triton.jit(do_not_specialize=("rows",))
def _output_gradient_kernel(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, d_ptr, bias_ptr, p_pitch, y_pitch, d_pitch, rows, channels,
    WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    p_pitch, y_pitch = in_units(p_pitch, UNIT), in_units(y_pitch, UNIT)
    d_pitch, channels = in_units(d_pitch, UNIT), in_units(channels, UNIT)
    tile, columns = tile_and_channels(channels, BC)
    row = (tile * BR + tl.arange(0, BR))[:, None]
    channel = columns[None, :]
    valid = channel < channels
    inside = (row < rows) & valid
    d = output_gradient(
        p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, p_pitch, y_pitch, row, channel, inside, valid, WIDE
    )  # fmt: skip
    tl.store(d_ptr + offset(row, d_pitch, WIDE) + channel, rounded_gradient(d, a_ptr, d_ptr.dtype.element_ty), mask=inside)
    if bias_ptr is not None:  # before rounding: that of a bias before a batch norm is zero, and what is rounded off would be all of it
        tl.store(bias_ptr + tile * channels + columns, tl.sum(tl.where(inside, d, 0.0), 0), mask=columns < channels)


def _output_gradient(edge: EdgePixels, dtype: torch.dtype, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(dY times the gradient factor of kernels/rounding.py in ``dtype``, channels_last; the sum of dY by channel in ``dtype``)."""
    p = edge.p
    d = empty_pixels(tuple(p.tensor.shape), dtype, p.tensor.device)
    channels = d.tensor.shape[1]
    tile = tiles.sweep(channels)
    row_tiles = triton.cdiv(p.rows, tile.rows)
    sums = partial_sums(1, row_tiles, channels, p.tensor.device) if needs_bias else None
    launch(
        _output_gradient_kernel, (row_tiles * triton.cdiv(channels, tile.channels),),
        *edge.pointers, d.tensor, sums, *edge.pitches, d.pitch, p.rows, channels,
        WIDE=edge.wide or d.wide, UNIT=unit_of(*edge.pitches, d.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return d.tensor, None if sums is None else sums[0].sum(0).to(dtype)
