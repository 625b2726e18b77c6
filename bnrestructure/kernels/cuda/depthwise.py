"""Depthwise convolution, forward and input gradient: a block of pixels by channels walks through the taps.

Every channel is a group of its own, so there is no matrix product and nothing is shared between channels.
Neighbouring pixels meet in cache: each is read from memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activate, activation_constants, pre_activation
from bnrestructure.kernels.cuda.dense_dgrad import InputGradient
from bnrestructure.kernels.cuda.edges import EdgePixels, output_gradient, store_input_gradient
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import destination, empty_pixels, pixels, vectors
from bnrestructure.kernels.cuda.merge import (
    merge_statistics,
    partial_statistics,
    partial_sums,
    store_partial_statistics,
)
from bnrestructure.kernels.cuda.precision import in_units, offset, rounded
from bnrestructure.kernels.cuda.problem import geometry_constants, unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels
from bnrestructure.ops.edges import ConvGeometry, Transform

__all__ = ["conv_forward", "dgrad"]


@triton.jit(do_not_specialize=("rows", "row_tiles", "H", "W", "OH", "OW"))
def _depthwise_forward_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, partial_ptr,
    x_pitch, y_pitch, rows, row_tiles, channels, H, W, OH, OW,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_pitch, y_pitch, channels = in_units(x_pitch, UNIT), in_units(y_pitch, UNIT), in_units(channels, UNIT)
    tile, channel = tile_and_channels(channels, BC)
    row = tile * BR + tl.arange(0, BR)
    valid = channel < channels
    stored = (row < rows)[:, None] & valid[None, :]
    n = row // (OH * OW)
    position = row - n * (OH * OW)
    top = position // OW * SH - PH
    left = position % OW * SW - PW
    total = tl.zeros((BR, BC), dtype=tl.float32)
    for tap_row in range(KH):
        ih = top + tap_row * DH
        for tap_column in tl.static_range(KW):
            iw = left + tap_column * DW
            inside = stored & ((ih >= 0) & (ih < H) & (iw >= 0) & (iw < W))[:, None]
            pixel = ((n * H + ih) * W + iw)[:, None]
            x = tl.load(x_ptr + offset(pixel, x_pitch, WIDE) + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            u = pre_activation(x, mean_ptr, scale_ptr, beta_ptr, channel[None, :], valid[None, :])
            z = activate(u, ACT, SLOPE)
            if gate_ptr is not None:
                z *= tl.load(gate_ptr + n[:, None] * channels + channel[None, :], mask=inside, other=0.0)
            z = rounded(tl.where(inside, z, 0.0), w_ptr.dtype.element_ty).to(tl.float32)
            w = tl.load(w_ptr + (tap_row * KW + tap_column) * channels + channel, mask=valid, other=0.0).to(tl.float32)
            total = tl.fma(z, w[None, :], total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=valid, other=0.0)[None, :]
    y = rounded(total, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset(row[:, None], y_pitch, WIDE) + channel[None, :], y, mask=stored)
    if partial_ptr is not None:
        count = tl.minimum(rows - tile * BR, BR).to(tl.float32)
        store_partial_statistics(
            partial_ptr, y.to(tl.float32), stored, tile, row_tiles, count, channel, channels, valid
        )


@triton.jit(do_not_specialize=("image_tiles", "row_tiles", "H", "W", "OH", "OW"))
def _depthwise_dgrad_kernel(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, w_ptr, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
    dx_ptr, partial_ptr, gate_partial_ptr,
    p_pitch, y_pitch, x_pitch, dx_pitch, image_tiles, row_tiles, channels, H, W, OH, OW,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    p_pitch, y_pitch, channels = in_units(p_pitch, UNIT), in_units(y_pitch, UNIT), in_units(channels, UNIT)
    x_pitch, dx_pitch = in_units(x_pitch, UNIT), in_units(dx_pitch, UNIT)
    tile, channel = tile_and_channels(channels, BC)
    n = tile // image_tiles  # no tile spans two images, so that a tile's sum for the gate belongs to one of them
    position = (tile - n * image_tiles) * BR + tl.arange(0, BR)
    valid = channel < channels
    stored = (position < H * W)[:, None] & valid[None, :]
    h = position // W
    w = position - h * W
    g = tl.zeros((BR, BC), dtype=tl.float32)
    for tap_row in range(KH):
        th = h + PH - tap_row * DH
        for tap_column in tl.static_range(KW):
            tw = w + PW - tap_column * DW
            meets = (th >= 0) & (th < OH * SH) & (tw >= 0) & (tw < OW * SW)
            if SH > 1 or SW > 1:
                meets = meets & (th % SH == 0) & (tw % SW == 0)
            inside = stored & meets[:, None]
            pixel = ((n * OH + th // SH) * OW + tw // SW)[:, None]
            d = output_gradient(
                p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, p_pitch, y_pitch,
                pixel, channel[None, :], inside, valid[None, :], WIDE,
            )  # fmt: skip
            d = tl.where(inside, d, 0.0)
            weight = tl.load(w_ptr + (tap_row * KW + tap_column) * channels + channel, mask=valid, other=0.0).to(
                tl.float32
            )
            g = tl.fma(d, weight[None, :], g)

    store_input_gradient(
        g, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, dx_ptr, partial_ptr, gate_partial_ptr,
        x_pitch, dx_pitch, n * H * W + position, channel, position < H * W, valid, n, tile, row_tiles, channels,
        ACT, SLOPE, ACCUMULATE, WIDE,
    )  # fmt: skip


def _weight_by_tap(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [C, 1, KH, KW] in ``dtype`` and in [KH, KW, C] memory order."""
    return weight.detach().to(dtype).permute(2, 3, 1, 0).contiguous()


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
    """(y, mean, var) as kernels/reference says, 2-D; x, the weight and ``dtype`` are fp32, bf16 or fp16."""
    source = pixels(x)
    batch, channels, h, w = x.shape
    kernel = weight.shape[2:]
    shape = (batch, channels, *geometry.output_size((h, w), tuple(kernel)))
    y = empty_pixels(shape, dtype, x.device) if out is None else destination(out, dtype, out)
    tile = tiles.depthwise(channels, streams=1)
    row_tiles = triton.cdiv(y.rows, tile.rows)
    partial = partial_statistics(row_tiles, channels, x.device) if statistics else None
    mean, scale, beta, gate, bias = vectors(transform.mean, transform.scale, transform.beta, transform.gate, bias)
    launch(
        _depthwise_forward_kernel, (row_tiles * triton.cdiv(channels, tile.channels),),
        source.tensor, _weight_by_tap(weight, dtype), bias, y.tensor, mean, scale, beta, gate, partial,
        source.pitch, y.pitch, y.rows, row_tiles, channels, h, w, *shape[2:],
        **activation_constants(transform.act), **geometry_constants(geometry, kernel),
        WIDE=source.wide or y.wide, UNIT=unit_of(source.pitch, y.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    result = y.tensor if out is None or y.tensor is out else out.copy_(y.tensor)
    found = (None, None) if partial is None else merge_statistics(partial, y.rows, tile.rows)
    return result, *found


def dgrad(
    edge: EdgePixels,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> InputGradient:
    """The gradient at x and what its epilogue sums; ``accumulate`` is added to in place and returned as dx."""
    batch, channels, h, w = x.shape
    source = pixels(x)
    dx = destination(x, x.dtype, accumulate)
    in_place = accumulate is not None and dx.tensor is accumulate
    gated = transform.gate is not None
    tile = tiles.depthwise(channels, streams=2)
    image_tiles = triton.cdiv(h * w, tile.rows)
    row_tiles = batch * image_tiles
    has_sums = transform.mean is not None and not gated
    partial = partial_sums(2, row_tiles, channels, x.device) if has_sums else None
    gate_partial = partial_sums(1, row_tiles, channels, x.device) if gated else None
    mean, scale, beta, gate = vectors(transform.mean, transform.scale, transform.beta, transform.gate)
    launch(
        _depthwise_dgrad_kernel, (row_tiles * triton.cdiv(channels, tile.channels),),
        *edge.pointers, _weight_by_tap(weight, dtype), source.tensor, mean, scale, beta, gate,
        dx.tensor, partial, gate_partial,
        *edge.pitches, source.pitch, dx.pitch, image_tiles, row_tiles, channels, h, w, *edge.size,
        **activation_constants(transform.act), **geometry_constants(geometry, weight.shape[2:]),
        ACCUMULATE=in_place, WIDE=edge.wide or source.wide or dx.wide,
        UNIT=unit_of(*edge.pitches, source.pitch, dx.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    sum_p, sum_px = (None, None) if partial is None else partial.sum(1).unbind()
    dgate = None if gate_partial is None else gate_partial.view(batch, -1, channels).sum(1)
    result = dx.tensor if accumulate is None or in_place else accumulate.add_(dx.tensor)
    return InputGradient(result, sum_p, sum_px, dgate)
