"""The fused depthwise convolution's forward: no product of matrices, but a few multiply-adds for each pixel and channel, by patches of
outputs (patches.py). The prologue and the epilogue are those of the dense kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activation_constants
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import destination, empty_pixels, pixels, vectors
from bnrestructure.kernels.cuda.merge import merge_statistics, partial_statistics, store_partial_statistics
from bnrestructure.kernels.cuda.patches import is_any_read, patches_in, tap_at, transformed_pixel, with_added_tap, with_last
from bnrestructure.kernels.cuda.precision import in_units, offset, representable
from bnrestructure.kernels.cuda.problem import geometry_constants, is_padded, unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels
from bnrestructure.kernels.unmerged import Mean, Unmerged, Wanted

__all__ = ["conv_forward", "weight_by_tap"]


@triton.jit
def _add_row(
    totals, row, x_ptr, w_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, x_pitch, n, ih, left, channel, channels, lanes, valid, H, W,
    ACT: tl.constexpr, SLOPE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    UNROLLED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``totals``, by output of the patch, with what one row of input pixels gives them: of UNROLLED kernels row ``row`` of what the patch
    reads, of others what tap row ``row`` reads.
    """
    for column in tl.static_range((WIDTH - 1) * SW + (KW - 1) * DW + 1):
        if is_any_read(column, WIDTH, SW, KW, DW):
            z = transformed_pixel(
                x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, x_pitch, n, ih, left + column, channel, channels, lanes, valid, H, W,
                ACT, SLOPE, PADDED, w_ptr.dtype.element_ty, WIDE,
            )  # fmt: skip
            for output in tl.static_range(HEIGHT * WIDTH):
                if tap_at(column - output % WIDTH * SW, DW, KW) >= 0:
                    if not UNROLLED:
                        tap = row * KW + tap_at(column - output % WIDTH * SW, DW, KW)
                        totals = with_added_tap(totals, output, z, w_ptr, tap, channel, channels, valid)
                    elif tap_at(row - output // WIDTH * SH, DH, KH) >= 0:
                        tap = tap_at(row - output // WIDTH * SH, DH, KH) * KW + tap_at(column - output % WIDTH * SW, DW, KW)
                        totals = with_added_tap(totals, output, z, w_ptr, tap, channel, channels, valid)
    return totals


@triton.jit(do_not_specialize=("patches", "row_tiles", "H", "W", "OH", "OW"))
def _depthwise_forward_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, partial_ptr, count_ptr,
    x_pitch, y_pitch, patches, row_tiles, channels, H, W, OH, OW,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    UNROLLED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_pitch, y_pitch, channels = in_units(x_pitch, UNIT), in_units(y_pitch, UNIT), in_units(channels, UNIT)
    tile, channel = tile_and_channels(channels, BC)
    valid = channel < channels
    patch = tile * BR + tl.arange(0, BR)
    lanes = patch < patches
    across = tl.cdiv(OW, WIDTH)
    of_image = tl.cdiv(OH, HEIGHT) * across
    n = patch // of_image
    oh = (patch - n * of_image) // across * HEIGHT
    ow = patch % across * WIDTH
    totals = (tl.zeros((BR, BC), dtype=tl.float32),) * (HEIGHT * WIDTH)
    if UNROLLED:
        for row in tl.static_range((HEIGHT - 1) * SH + (KH - 1) * DH + 1):
            if is_any_read(row, HEIGHT, SH, KH, DH):
                totals = _add_row(
                    totals, row, x_ptr, w_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
                    x_pitch, n, oh * SH - PH + row, ow * SW - PW, channel, channels, lanes, valid, H, W,
                    ACT, SLOPE, KH, KW, SH, SW, DH, DW, PADDED, WIDE, UNROLLED, HEIGHT, WIDTH,
                )  # fmt: skip
    else:
        for row in range(KH):
            totals = _add_row(
                totals, row, x_ptr, w_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
                x_pitch, n, oh * SH - PH + row * DH, ow * SW - PW, channel, channels, lanes, valid, H, W,
                ACT, SLOPE, KH, KW, SH, SW, DH, DW, PADDED, WIDE, UNROLLED, HEIGHT, WIDTH,
            )  # fmt: skip
    results, stored = (), ()
    count = tl.zeros((BR,), dtype=tl.int32)
    for output in tl.static_range(HEIGHT * WIDTH):
        row_valid = lanes & (oh + output // WIDTH < OH) & (ow + output % WIDTH < OW)
        pixel = ((n * OH + oh + output // WIDTH) * OW + ow + output % WIDTH)[:, None]
        total = totals[output]
        if bias_ptr is not None:
            total += tl.load(bias_ptr + channel, mask=valid, other=0.0)[None, :]
        y = representable(total, y_ptr.dtype.element_ty)
        results = with_last(results, y)
        stored = with_last(stored, row_valid[:, None] & valid[None, :])
        count += row_valid.to(tl.int32)
        place = y_ptr + offset(pixel, y_pitch, WIDE) + channel[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=stored[output])
    if partial_ptr is not None:
        all_of_tile = tl.sum(count, 0).to(tl.float32)
        first = tl.program_id(0) % tl.cdiv(channels, BC) == 0  # all channels of a tile have as many pixels
        tl.store(count_ptr + tile, all_of_tile, mask=first)
        store_partial_statistics(
            partial_ptr, results, stored, tile, row_tiles, all_of_tile, channel, channels, valid, HEIGHT * WIDTH
        )


def weight_by_tap(weight: Tensor, dtype: torch.dtype) -> Tensor:
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
    statistics: Wanted,
    out: Tensor | None = None,
) -> tuple[Tensor, Mean, Tensor | None]:
    """(y, mean, var) as kernels/reference says, 2-D; x, the weight and ``dtype`` are fp32, bf16 or fp16."""
    source = pixels(x)
    batch, channels, h, w = x.shape
    kernel = tuple(weight.shape[2:])
    size = geometry.output_size((h, w), kernel)
    shape = (batch, channels, *size)
    y = empty_pixels(shape, dtype, x.device) if out is None else destination(out, dtype, out)
    tile = tiles.depthwise_forward(channels, size, kernel, geometry.stride, dtype.itemsize)
    patches = batch * patches_in(size, tile.height, tile.width)
    row_tiles = tiles.cdiv(patches, tile.rows)
    partial = partial_statistics(row_tiles, channels, x.device) if statistics else None
    counts = torch.empty(row_tiles, dtype=torch.float32, device=x.device) if statistics else None
    mean, scale, beta, gate, bias = vectors(transform.mean, transform.scale, transform.beta, transform.gate, bias)
    launch(
        _depthwise_forward_kernel, (row_tiles * tiles.cdiv(channels, tile.channels),),
        source.tensor, weight_by_tap(weight, dtype), bias, y.tensor, mean, scale, beta, gate, partial, counts,
        source.pitch, y.pitch, patches, row_tiles, channels, h, w, *size,
        **activation_constants(transform.act), **geometry_constants(geometry, kernel),
        PADDED=is_padded(geometry), WIDE=source.wide or y.wide, UNIT=unit_of(source.pitch, y.pitch, channels), **tile.constants,
        warps=tile.warps,
    )  # fmt: skip
    result = y.tensor if out is None or y.tensor is out else out.copy_(y.tensor)
    return result, *merge_statistics(None if partial is None else Unmerged(partial, counts=counts), statistics)
