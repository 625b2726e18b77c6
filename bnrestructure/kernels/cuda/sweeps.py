"""The sweeps of one tensor: normalise, and squeeze (the global average), forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activate, activation_constants, pre_activation
from bnrestructure.kernels.cuda.edges import (
    input_gradient,
    load_raw,
    load_vector,
    store_gradient,
    store_input_gradient,
    store_sums,
)
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import Pixels, destination, pixels, vectors
from bnrestructure.kernels.cuda.merge import partial_sums
from bnrestructure.kernels.cuda.precision import in_units, offset, rounded
from bnrestructure.kernels.cuda.problem import unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels
from bnrestructure.kernels.cuda.sums import Sums, totals

__all__ = ["normalise_backward", "normalise_forward", "squeeze_backward", "squeeze_forward"]

Gradients = tuple[Tensor, Tensor | None, Tensor | None]


@triton.jit(do_not_specialize=("rows", "positions"))
def _normalise_kernel(
    x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, r_ptr, z_ptr, x_pitch, r_pitch, z_pitch, rows, channels, positions,
    ACT: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_pitch, z_pitch, channels = in_units(x_pitch, UNIT), in_units(z_pitch, UNIT), in_units(channels, UNIT)
    r_pitch = in_units(r_pitch, UNIT)
    tile, columns = tile_and_channels(channels, BC)
    row = (tile * BR + tl.arange(0, BR))[:, None]
    channel = columns[None, :]
    valid = channel < channels
    inside = (row < rows) & valid
    x = tl.load(x_ptr + offset(row, x_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    z = activate(pre_activation(x, mean_ptr, scale_ptr, beta_ptr, channel, valid), ACT, SLOPE)
    if gate_ptr is not None:
        z *= tl.load(gate_ptr + row // positions * channels + channel, mask=inside, other=0.0)
    if r_ptr is not None:
        z += tl.load(r_ptr + offset(row, r_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(z_ptr + offset(row, z_pitch, WIDE) + channel, rounded(z, z_ptr.dtype.element_ty), mask=inside)


def normalise_forward(
    x: Tensor, transform: Transform, *, dtype: torch.dtype, out: Tensor | None = None, r: Tensor | None = None
) -> Tensor:
    """``z = act((x - mean) * scale + beta) * gate + r`` in ``dtype``; written to ``out`` (any strides) when given."""
    source, added = pixels(x), None if r is None else pixels(r)
    z = destination(x, dtype if out is None else out.dtype, out)
    _, channels, h, w = x.shape
    tile = tiles.sweep(channels)
    pitches = (source.pitch, 0 if added is None else added.pitch, z.pitch)
    launch(
        _normalise_kernel, (tiles.cdiv(source.rows, tile.rows) * tiles.cdiv(channels, tile.channels),),
        source.tensor, *vectors(transform.mean, transform.scale, transform.beta, transform.gate),
        None if added is None else added.tensor, z.tensor, *pitches, source.rows, channels, h * w,
        **activation_constants(transform.act), WIDE=source.wide or z.wide or (added is not None and added.wide),
        UNIT=unit_of(*pitches, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return z.tensor if out is None or z.tensor is out else out.copy_(z.tensor)


@triton.jit(do_not_specialize=("rows", "row_tiles", "positions"))
def _normalise_backward_kernel(
    x_ptr, dz_ptr, factors_ptr, pooled_ptr, mean_ptr, scale_ptr, beta_ptr, dx_ptr, partial_ptr,
    dz_pitch, x_pitch, dx_pitch, rows, row_tiles, positions, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, FACTOR: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    dz_pitch, x_pitch = in_units(dz_pitch, UNIT), in_units(x_pitch, UNIT)
    dx_pitch, channels = in_units(dx_pitch, UNIT), in_units(channels, UNIT)
    tile, channel = tile_and_channels(channels, BC)
    row = tile * BR + tl.arange(0, BR)
    row_valid = row < rows
    valid = channel < channels
    inside = row_valid[:, None] & valid[None, :]
    g = tl.zeros((BR, BC), dtype=tl.float32)
    if dz_ptr is not None:
        place = dz_ptr + offset(row[:, None], dz_pitch, WIDE) + channel[None, :]
        g += tl.load(place, mask=inside, other=0.0).to(tl.float32) * FACTOR
    if factors_ptr is not None:
        image = row // positions
        g *= tl.load(factors_ptr + image[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    if pooled_ptr is not None:
        image = row // positions
        g += tl.load(pooled_ptr + image[:, None] * channels + channel[None, :], mask=inside, other=0.0) / positions
    store_input_gradient(
        g, x_ptr, mean_ptr, scale_ptr, beta_ptr, dx_ptr, partial_ptr,
        x_pitch, dx_pitch, row, channel, row_valid, valid, tile, row_tiles, channels, ACT, SLOPE, ACCUMULATE, WIDE,
        DITHER=pooled_ptr is not None,
    )  # fmt: skip


def _backward(
    dz: Tensor | None,
    dpooled: Tensor | None,
    x: Tensor,
    transform: Transform,
    dx: Pixels,
    add: bool,
    factor: float = 1.0,
    factors: Tensor | None = None,
    sums: Sums | None = None,
) -> Gradients:
    """Writes ``dx``, or adds to it, from the gradient at z, ``factor * factors * dz + dpooled / positions``; returns (dx, SP, SPX)."""
    source, gradient = pixels(x), None if dz is None else pixels(dz)
    pooled = None if dpooled is None else dpooled.to(torch.float32).contiguous()
    _, channels, h, w = x.shape
    pitches = (0 if gradient is None else gradient.pitch, source.pitch, dx.pitch)
    tile = tiles.sweep(channels)
    row_tiles = tiles.cdiv(source.rows, tile.rows)
    partial = None if transform.mean is None else partial_sums(2, row_tiles, channels, x.device)
    launch(
        _normalise_backward_kernel, (row_tiles * tiles.cdiv(channels, tile.channels),),
        source.tensor, None if gradient is None else gradient.tensor, *vectors(factors), pooled,
        *vectors(transform.mean, transform.scale, transform.beta), dx.tensor, partial,
        *pitches, source.rows, row_tiles, h * w, channels,
        **activation_constants(transform.act), FACTOR=factor, ACCUMULATE=add,
        WIDE=source.wide or dx.wide or (gradient is not None and gradient.wide),
        UNIT=unit_of(*pitches, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    sum_p, sum_px = (None, None) if partial is None else totals(partial, sums).unbind()
    return dx.tensor, sum_p, sum_px


def normalise_backward(
    dz: Tensor,
    x: Tensor,
    transform: Transform,
    *,
    accumulate: Tensor | None = None,
    factor: float = 1.0,
    factors: Tensor | None = None,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, SP, SPX, the gate's gradient) from the gradient at z, ``factor * factors * dz``.

    dx is added in place to ``accumulate`` when given. With a gate dx is the gradient at what the gate multiplies, and there are no sums.
    """
    dx = destination(x, x.dtype, accumulate)
    in_place = accumulate is not None and dx.tensor is accumulate
    sum_p = sum_px = gate = None
    if transform.gate is None:
        found, sum_p, sum_px = _backward(dz, None, x, transform, dx, in_place, factor, factors, sums)
    else:
        found, gate = _gated_backward(dz, x, transform, dx, in_place, factor)
    return found if accumulate is None or in_place else accumulate.add_(found), sum_p, sum_px, gate


@triton.jit(do_not_specialize=("positions", "image_tiles", "row_tiles"))
def _gated_backward_kernel(
    x_ptr, dz_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, dx_ptr, partial_ptr,
    dz_pitch, x_pitch, dx_pitch, positions, image_tiles, row_tiles, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, FACTOR: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    dz_pitch, x_pitch = in_units(dz_pitch, UNIT), in_units(x_pitch, UNIT)
    dx_pitch, channels = in_units(dx_pitch, UNIT), in_units(channels, UNIT)
    tile, channel = tile_and_channels(channels, BC)  # of one image's pixels
    image = tile // image_tiles
    pixel = (tile % image_tiles) * BR + tl.arange(0, BR)
    row_valid = pixel < positions
    row = image * positions + pixel
    valid = channel < channels
    g = load_raw(dz_ptr, dz_pitch, row, channel, row_valid, valid, WIDE).to(tl.float32) * FACTOR
    x = load_raw(x_ptr, x_pitch, row, channel, row_valid, valid, WIDE).to(tl.float32)
    mean = load_vector(mean_ptr, channel, valid)
    scale = load_vector(scale_ptr, channel, valid)
    beta = load_vector(beta_ptr, channel, valid)
    g, first, second = input_gradient(g, x, mean, scale, beta, gate_ptr, channel, row_valid, valid, image, channels, ACT, SLOPE)
    store_sums(first, second, mean_ptr, gate_ptr, None, partial_ptr, channel, valid, tile, row_tiles, channels)
    store_gradient(g, dx_ptr, dx_pitch, row, channel, row_valid, valid, ACCUMULATE, WIDE)


def _gated_backward(dz: Tensor, x: Tensor, transform: Transform, dx: Pixels, add: bool, factor: float) -> tuple[Tensor, Tensor]:
    """Writes ``dx``, or adds to it: the gradient at the gate's input; returns it, and the gate's gradient [N, C]."""
    source, gradient = pixels(x), pixels(dz)
    images, channels, h, w = x.shape
    pitches = (gradient.pitch, source.pitch, dx.pitch)
    tile = tiles.sweep(channels)
    image_tiles = tiles.cdiv(h * w, tile.rows)
    partial = partial_sums(1, images * image_tiles, channels, x.device)
    launch(
        _gated_backward_kernel, (images * image_tiles * tiles.cdiv(channels, tile.channels),),
        source.tensor, gradient.tensor, *vectors(transform.mean, transform.scale, transform.beta, transform.gate), dx.tensor, partial,
        *pitches, h * w, image_tiles, images * image_tiles, channels,
        **activation_constants(transform.act), FACTOR=factor, ACCUMULATE=add, WIDE=source.wide or dx.wide or gradient.wide,
        UNIT=unit_of(*pitches, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return dx.tensor, partial.view(images, image_tiles, channels).sum(1)


@triton.jit(do_not_specialize=("positions",))
def _squeeze_kernel(
    x_ptr, mean_ptr, scale_ptr, beta_ptr, pooled_ptr, pitch, positions, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pitch, channels = in_units(pitch, UNIT), in_units(channels, UNIT)
    image, channel = tile_and_channels(channels, BC)
    valid = channel < channels
    total = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, positions, BR):
        position = start + tl.arange(0, BR)
        inside = (position < positions)[:, None] & valid[None, :]
        pixel = (image * positions + position)[:, None]
        x = tl.load(x_ptr + offset(pixel, pitch, WIDE) + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        u = pre_activation(x, mean_ptr, scale_ptr, beta_ptr, channel[None, :], valid[None, :])
        total += tl.where(inside, activate(u, ACT, SLOPE), 0.0)
    pooled = rounded(tl.sum(total, 0) / positions, pooled_ptr.dtype.element_ty)
    tl.store(pooled_ptr + image * channels + channel, pooled, mask=valid)


def squeeze_forward(x: Tensor, transform: Transform, *, dtype: torch.dtype) -> Tensor:
    """Mean of ``act((x - mean) * scale + beta)`` over the positions, [N, C] in ``dtype``."""
    source = pixels(x)
    batch, channels, h, w = x.shape
    tile = tiles.sweep(channels)
    pooled = torch.empty(batch, channels, dtype=dtype, device=x.device)
    launch(
        _squeeze_kernel, (batch * tiles.cdiv(channels, tile.channels),),
        source.tensor, *vectors(transform.mean, transform.scale, transform.beta), pooled, source.pitch, h * w, channels,
        **activation_constants(transform.act), WIDE=source.wide,
        UNIT=unit_of(source.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return pooled


def squeeze_backward(
    dpooled: Tensor, dz: Tensor | None, x: Tensor, transform: Transform, *, accumulate: Tensor | None = None
) -> Gradients:
    """(dx, SP, SPX) from the gradient at z, ``dpooled / positions + dz``.

    dx is added in place to ``accumulate`` when given; one that is ``dz`` itself is overwritten.
    """
    overwritten = accumulate is not None and accumulate is dz
    dx = destination(x, x.dtype, accumulate)
    in_place = accumulate is not None and dx.tensor is accumulate
    found, sum_p, sum_px = _backward(dz, dpooled, x, transform, dx, in_place and not overwritten)
    if accumulate is None or in_place:
        return found, sum_p, sum_px
    return accumulate.copy_(found) if overwritten else accumulate.add_(found), sum_p, sum_px
