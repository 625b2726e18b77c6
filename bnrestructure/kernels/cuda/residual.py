"""The residual join, forward and backward: normalise both operands, add, activate, and the statistics, in one sweep."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activate, activation_constants, pre_activation, pull_back
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import empty_pixels, pixels, vectors
from bnrestructure.kernels.cuda.merge import (
    merge_statistics,
    partial_statistics,
    partial_sums,
    store_partial_statistics,
)
from bnrestructure.kernels.cuda.precision import dithered, in_units, offset, representable, rounded
from bnrestructure.kernels.cuda.problem import unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels
from bnrestructure.kernels.cuda.sums import Sums, totals
from bnrestructure.kernels.unmerged import Mean, Unmerged, Wanted

__all__ = ["residual_backward", "residual_forward"]


@triton.jit(do_not_specialize=("rows", "row_tiles", "positions"))
def _residual_kernel(
    y_ptr, r_ptr, y_mean_ptr, y_scale_ptr, y_beta_ptr, gate_ptr, r_mean_ptr, r_scale_ptr, r_beta_ptr, out_ptr, partial_ptr,
    y_pitch, r_pitch, out_pitch, rows, row_tiles, positions, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    y_pitch, r_pitch = in_units(y_pitch, UNIT), in_units(r_pitch, UNIT)
    out_pitch, channels = in_units(out_pitch, UNIT), in_units(channels, UNIT)
    tile, columns = tile_and_channels(channels, BC)
    row = (tile * BR + tl.arange(0, BR))[:, None]
    channel = columns[None, :]
    valid = channel < channels
    inside = (row < rows) & valid
    y = tl.load(y_ptr + offset(row, y_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + offset(row, r_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    u = pre_activation(y, y_mean_ptr, y_scale_ptr, y_beta_ptr, channel, valid)
    if gate_ptr is not None:
        u *= tl.load(gate_ptr + row // positions * channels + channel, mask=inside, other=0.0)
    u += pre_activation(r, r_mean_ptr, r_scale_ptr, r_beta_ptr, channel, valid)
    out = representable(activate(u, ACT, SLOPE), out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset(row, out_pitch, WIDE) + channel, out.to(out_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        count = tl.minimum(rows - tile * BR, BR).to(tl.float32)
        store_partial_statistics(
            partial_ptr, (out,), (inside,), tile, row_tiles, count, columns, channels, columns < channels
        )


def residual_forward(
    y: Tensor,
    ty: Transform,
    r: Tensor,
    tr: Transform,
    act: str,
    *,
    dtype: torch.dtype,
    statistics: Wanted,
    into: Tensor | None = None,
) -> tuple[Tensor, Mean, Tensor | None]:
    """``out = act(ty(y) + tr(r))`` in ``dtype``, and its statistics if asked for. ``into`` is channels_last in ``dtype``."""
    left, right = pixels(y), pixels(r)
    out = empty_pixels(tuple(y.shape), dtype, y.device) if into is None else pixels(into)
    _, channels, h, w = y.shape
    tile = tiles.sweep(channels)
    row_tiles = tiles.cdiv(out.rows, tile.rows)
    partial = partial_statistics(row_tiles, channels, y.device) if statistics else None
    launch(
        _residual_kernel, (row_tiles * tiles.cdiv(channels, tile.channels),),
        left.tensor, right.tensor, *vectors(ty.mean, ty.scale, ty.beta, ty.gate, tr.mean, tr.scale, tr.beta),
        out.tensor, partial,
        left.pitch, right.pitch, out.pitch, out.rows, row_tiles, h * w, channels,
        **activation_constants(act), WIDE=left.wide or right.wide or out.wide,
        UNIT=unit_of(left.pitch, right.pitch, out.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return out.tensor, *merge_statistics(None if partial is None else Unmerged(partial, out.rows, tile.rows), statistics)


@triton.jit(do_not_specialize=("rows", "row_tiles", "positions"))
def _residual_backward_kernel(
    dout_ptr, more_ptr, a_ptr, b_ptr, mean_ptr, y_ptr, r_ptr, out_ptr,
    y_mean_ptr, y_scale_ptr, y_beta_ptr, gate_ptr, r_mean_ptr, r_scale_ptr, r_beta_ptr, g_ptr, partial_ptr,
    dout_pitch, more_pitch, y_pitch, r_pitch, out_pitch, g_pitch, rows, row_tiles, positions, channels,
    FACTOR: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    dout_pitch, more_pitch, y_pitch = in_units(dout_pitch, UNIT), in_units(more_pitch, UNIT), in_units(y_pitch, UNIT)
    r_pitch, out_pitch = in_units(r_pitch, UNIT), in_units(out_pitch, UNIT)
    g_pitch, channels = in_units(g_pitch, UNIT), in_units(channels, UNIT)
    tile, columns = tile_and_channels(channels, BC)
    row = (tile * BR + tl.arange(0, BR))[:, None]
    channel = columns[None, :]
    valid = channel < channels
    inside = (row < rows) & valid
    g = tl.load(dout_ptr + offset(row, dout_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    if FACTOR != 1.0:
        g *= FACTOR
    if more_ptr is not None:
        g += tl.load(more_ptr + offset(row, more_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    if a_ptr is not None:
        out = tl.load(out_ptr + offset(row, out_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + channel, mask=valid, other=0.0)
        b = tl.load(b_ptr + channel, mask=valid, other=0.0)
        g = tl.fma(out - tl.load(mean_ptr + channel, mask=valid, other=0.0), a, g + b)
    y = tl.load(y_ptr + offset(row, y_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + offset(row, r_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    u = pre_activation(y, y_mean_ptr, y_scale_ptr, y_beta_ptr, channel, valid)
    if gate_ptr is not None:
        u *= tl.load(gate_ptr + row // positions * channels + channel, mask=inside, other=0.0)
    u += pre_activation(r, r_mean_ptr, r_scale_ptr, r_beta_ptr, channel, valid)
    g = tl.where(inside, pull_back(g, u, ACT, SLOPE), 0.0)
    place = g_ptr + offset(row, g_pitch, WIDE) + channel
    if a_ptr is not None:
        tl.store(place, dithered(g, row, g_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(place, rounded(g, g_ptr.dtype.element_ty), mask=inside)
    place = partial_ptr + tile * channels + columns
    tl.store(place, tl.sum(g, 0), mask=columns < channels)
    if y_mean_ptr is not None and gate_ptr is None:
        place += row_tiles * channels
        centred = y - tl.load(y_mean_ptr + channel, mask=valid, other=0.0)
        tl.store(place, tl.sum(g * centred, 0), mask=columns < channels)
    if r_mean_ptr is not None:
        place += row_tiles * channels
        centred = r - tl.load(r_mean_ptr + channel, mask=valid, other=0.0)
        tl.store(place, tl.sum(g * centred, 0), mask=columns < channels)


def residual_backward(
    dout: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor] | None,
    y: Tensor,
    ty: Transform,
    r: Tensor,
    tr: Transform,
    out: Tensor,
    act: str,
    *,
    factor: float = 1.0,
    more: Tensor | None = None,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(G, SP, SPY, SPR): see kernels/reference/sweeps.py. G is always fresh memory. The gradient is ``factor * dout + more``.

    The last three are due in ``sums``, where it is given.
    """
    gradient, left, right, kept = pixels(dout), pixels(y), pixels(r), pixels(out)
    g = empty_pixels(tuple(out.shape), out.dtype, out.device)
    _, channels, h, w = out.shape
    tile = tiles.sweep(channels)
    row_tiles = tiles.cdiv(g.rows, tile.rows)
    has_py, has_pr = ty.gives_sums, tr.mean is not None
    partial = partial_sums(1 + has_py + has_pr, row_tiles, channels, out.device)
    added = None if more is None else pixels(more)
    operands = (gradient, *([] if added is None else [added]), left, right, kept, g)
    pitches = (gradient.pitch, 0 if added is None else added.pitch, left.pitch, right.pitch, kept.pitch, g.pitch)
    launch(
        _residual_backward_kernel, (row_tiles * tiles.cdiv(channels, tile.channels),),
        gradient.tensor, None if added is None else added.tensor, *vectors(*(statistics or (None, None, None))),
        left.tensor, right.tensor, kept.tensor,
        *vectors(ty.mean, ty.scale, ty.beta, ty.gate, tr.mean, tr.scale, tr.beta), g.tensor, partial,
        *pitches, g.rows, row_tiles, h * w, channels, FACTOR=factor,
        **activation_constants(act), WIDE=any(operand.wide for operand in operands),
        UNIT=unit_of(*pitches, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    found = totals(partial, sums)
    return g.tensor, found[0], found[1] if has_py else None, found[-1] if has_pr else None
