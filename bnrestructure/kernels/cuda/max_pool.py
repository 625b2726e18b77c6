"""Max pooling with a normalisation and activation in its prologue, and its backward by gathering: nothing is atomic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import PoolGeometry, Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activate, activation_constants, pre_activation
from bnrestructure.kernels.cuda.edges import store_input_gradient
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import destination, empty_pixels, pixels, vectors
from bnrestructure.kernels.cuda.merge import partial_sums
from bnrestructure.kernels.cuda.precision import in_units, offset, rounded
from bnrestructure.kernels.cuda.problem import unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels

__all__ = ["max_pool_backward", "max_pool_forward"]

Sums = tuple[Tensor, Tensor | None, Tensor | None]


@triton.jit(do_not_specialize=("rows", "H", "W", "OH", "OW"))
def _max_pool_kernel(
    x_ptr, mean_ptr, scale_ptr, beta_ptr, y_ptr, index_ptr, pitch, rows, channels, H, W, OH, OW,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pitch, channels = in_units(pitch, UNIT), in_units(channels, UNIT)
    tile, channel = tile_and_channels(channels, BC)
    row = tile * BR + tl.arange(0, BR)
    valid = channel < channels
    stored = (row < rows)[:, None] & valid[None, :]
    n = row // (OH * OW)
    position = row - n * (OH * OW)
    top = position // OW * SH - PH
    left = position % OW * SW - PW
    best = tl.full((BR, BC), float("-inf"), dtype=tl.float32)
    index = tl.full((BR, BC), -1, dtype=tl.int32)
    for tap_row in range(KH):
        ih = top + tap_row
        for tap_column in tl.static_range(KW):
            iw = left + tap_column
            inside = stored & ((ih >= 0) & (ih < H) & (iw >= 0) & (iw < W))[:, None]
            pixel = ((n * H + ih) * W + iw)[:, None]
            x = tl.load(x_ptr + offset(pixel, pitch, WIDE) + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            u = pre_activation(x, mean_ptr, scale_ptr, beta_ptr, channel[None, :], valid[None, :])
            # Compared as stored: values that differ in fp32 alone are a tie, and the first is taken.
            z = rounded(activate(u, ACT, SLOPE), y_ptr.dtype.element_ty).to(tl.float32)
            better = inside & ((z > best) | (z != z) | (index < 0))
            best = tl.where(better, z, best)
            index = tl.where(better, tap_row * KW + tap_column, index)
    place = offset(row[:, None], channels, WIDE) + channel[None, :]
    tl.store(y_ptr + place, rounded(best, y_ptr.dtype.element_ty), mask=stored)
    tl.store(index_ptr + place, index.to(tl.uint8), mask=stored)


def _output_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """PyTorch's: with ``ceil_mode`` a last window may reach over the end, but not start in the padding there."""
    out = (size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def _constants(geometry: PoolGeometry) -> dict[str, int]:
    pairs = {"K": geometry.kernel, "S": geometry.stride, "P": geometry.padding}
    return {f"{name}{axis}": pair[i] for name, pair in pairs.items() for i, axis in enumerate("HW")}


def max_pool_forward(
    x: Tensor, transform: Transform, geometry: PoolGeometry, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(y in ``dtype``, uint8 position of the maximum in its window): see kernels/reference/sweeps.py."""
    source = pixels(x)
    batch, channels, *size = x.shape
    h, w = (
        _output_size(size[i], geometry.kernel[i], geometry.stride[i], geometry.padding[i], geometry.ceil_mode)
        for i in (0, 1)
    )
    y = empty_pixels((batch, channels, h, w), dtype, x.device)
    index = empty_pixels((batch, channels, h, w), torch.uint8, x.device)
    tile = tiles.max_pool(channels)
    launch(
        _max_pool_kernel, (tiles.cdiv(y.rows, tile.rows) * tiles.cdiv(channels, tile.channels),),
        source.tensor, *vectors(transform.mean, transform.scale, transform.beta), y.tensor, index.tensor,
        source.pitch, y.rows, channels, *size, h, w,
        **activation_constants(transform.act), **_constants(geometry), WIDE=source.wide or y.wide,
        UNIT=unit_of(source.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return y.tensor, index.tensor


@triton.jit(do_not_specialize=("rows", "row_tiles", "H", "W", "OH", "OW"))
def _max_pool_backward_kernel(
    dy_ptr, index_ptr, x_ptr, mean_ptr, scale_ptr, beta_ptr, dx_ptr, partial_ptr,
    dy_pitch, index_pitch, x_pitch, dx_pitch, rows, row_tiles, channels, H, W, OH, OW,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    dy_pitch, index_pitch = in_units(dy_pitch, UNIT), in_units(index_pitch, UNIT)
    x_pitch, dx_pitch, channels = in_units(x_pitch, UNIT), in_units(dx_pitch, UNIT), in_units(channels, UNIT)
    tile, channel = tile_and_channels(channels, BC)
    row = tile * BR + tl.arange(0, BR)
    row_valid = row < rows
    valid = channel < channels
    n = row // (H * W)
    position = row - n * (H * W)
    h = position // W
    w = position - h * W
    g = tl.zeros((BR, BC), dtype=tl.float32)
    for row_back in range((KH + SH - 1) // SH):  # the windows that may have taken this pixel: the last one, and those before it
        th = (h + PH) // SH - row_back
        tap_row = h + PH - th * SH
        row_meets = row_valid & (th >= 0) & (th < OH) & (tap_row < KH)
        for column_back in tl.static_range((KW + SW - 1) // SW):
            tw = (w + PW) // SW - column_back
            tap_column = w + PW - tw * SW
            meets = row_meets & (tw >= 0) & (tw < OW) & (tap_column < KW)
            inside = meets[:, None] & valid[None, :]
            pixel = ((n * OH + th) * OW + tw)[:, None]
            taken = tl.load(index_ptr + offset(pixel, index_pitch, WIDE) + channel[None, :], mask=inside, other=255)
            dy = tl.load(dy_ptr + offset(pixel, dy_pitch, WIDE) + channel[None, :], mask=inside, other=0.0)
            # Chosen behind the load: a mask that differs from channel to channel forbids to load several at once.
            g += tl.where(taken.to(tl.int32) == (tap_row * KW + tap_column)[:, None], dy.to(tl.float32), 0.0)
    store_input_gradient(
        g, x_ptr, mean_ptr, scale_ptr, beta_ptr, dx_ptr, partial_ptr,
        x_pitch, dx_pitch, row, channel, row_valid, valid, tile, row_tiles, channels, ACT, SLOPE, ACCUMULATE, WIDE,
    )  # fmt: skip


def max_pool_backward(
    dy: Tensor,
    index: Tensor,
    x: Tensor,
    transform: Transform,
    geometry: PoolGeometry,
    *,
    accumulate: Tensor | None = None,
) -> Sums:
    """(dx, SP, SPX) of :func:`max_pool_forward`; dx is added in place to ``accumulate`` when given."""
    gradient, taken, source = pixels(dy), pixels(index), pixels(x)
    dx = destination(x, x.dtype, accumulate)
    in_place = accumulate is not None and dx.tensor is accumulate
    _, channels, *size = x.shape
    tile = tiles.max_pool_backward(channels)
    row_tiles = tiles.cdiv(source.rows, tile.rows)
    partial = None if transform.mean is None else partial_sums(2, row_tiles, channels, x.device)
    operands = (gradient, taken, source, dx)
    launch(
        _max_pool_backward_kernel, (row_tiles * tiles.cdiv(channels, tile.channels),),
        gradient.tensor, taken.tensor, source.tensor, *vectors(transform.mean, transform.scale, transform.beta),
        dx.tensor, partial, *(operand.pitch for operand in operands),
        source.rows, row_tiles, channels, *size, *dy.shape[2:],
        **activation_constants(transform.act), **_constants(geometry), ACCUMULATE=in_place,
        WIDE=any(operand.wide for operand in operands),
        UNIT=unit_of(*(operand.pitch for operand in operands), channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    sum_p, sum_px = (None, None) if partial is None else partial.sum(1).unbind()
    return dx.tensor if accumulate is None or in_place else accumulate.add_(dx.tensor), sum_p, sum_px
