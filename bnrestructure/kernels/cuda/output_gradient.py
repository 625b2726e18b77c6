"""dY of a convolution, for a product that somebody else computes (kernels/hybrid.py): in a sweep of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from bnrestructure.kernels.calls import OutputGradient, OutputGradientResult
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.edges import edge_pixels, output_gradient
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import empty_pixels
from bnrestructure.kernels.cuda.merge import partial_sums
from bnrestructure.kernels.cuda.precision import in_units, offset, rounded_gradient
from bnrestructure.kernels.cuda.problem import unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels

__all__ = ["output_gradient_sweep"]


@triton.jit(do_not_specialize=("rows",))
def _output_gradient_kernel(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, d_ptr, bias_ptr, p_pitch, y_pitch, d_pitch, rows, channels,
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
        p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, p_pitch, y_pitch, row, channel, inside, valid, WIDE
    )  # fmt: skip
    tl.store(d_ptr + offset(row, d_pitch, WIDE) + channel, rounded_gradient(d, a_ptr, d_ptr.dtype.element_ty), mask=inside)
    if bias_ptr is not None:  # before rounding: that of a bias before a batch norm is zero, and what is rounded off would be all of it
        tl.store(bias_ptr + tile * channels + columns, tl.sum(tl.where(inside, d, 0.0), 0), mask=columns < channels)


def output_gradient_sweep(call: OutputGradient) -> OutputGradientResult:
    """See :class:`OutputGradient`; its factor must be the one that kernels/rounding.py has for the edge."""
    dtype, edge = call.dtype, edge_pixels(call.dy, call.edge)
    p = edge.p
    d = empty_pixels(tuple(p.tensor.shape), dtype, p.tensor.device)
    channels = d.tensor.shape[1]
    tile = tiles.sweep(channels)
    row_tiles = tiles.cdiv(p.rows, tile.rows)
    sums = partial_sums(1, row_tiles, channels, p.tensor.device) if call.bias else None
    launch(
        _output_gradient_kernel, (row_tiles * tiles.cdiv(channels, tile.channels),),
        *edge.pointers, d.tensor, sums, *edge.pitches, d.pitch, p.rows, channels,
        WIDE=edge.wide or d.wide, UNIT=unit_of(*edge.pitches, d.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return OutputGradientResult(d.tensor, None if sums is None else sums[0].sum(0))
