"""From the partial results of tiles to per-channel totals: Chan's formula for statistics, plain sums for gradients.

A tile's mean is kept as two numbers, the fp32 mean and what its rounding left out: where |mean| is large beside the
deviation, the rounding alone would show in the variance between tiles. Tile i covers the rows from i * unit
up to (i + 1) * unit, the last one fewer, so the counts need not be stored. Nothing here is atomic: the same input gives
the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.launch import launch

__all__ = ["merge_statistics", "partial_statistics", "partial_sums", "store_partial_statistics"]


def partial_sums(planes: int, count: int, channels: int, device: torch.device) -> Tensor:
    """Room for ``planes`` sums of ``count`` tiles: [planes, count, C] fp32, uninitialised; sum(1) are the totals."""
    return torch.empty(planes, count, channels, dtype=torch.float32, device=device)


def partial_statistics(count: int, channels: int, device: torch.device) -> Tensor:
    """Room for what :func:`merge_statistics` merges, uninitialised: [3, count, C] of (mean, remainder, M2) by tile."""
    return partial_sums(3, count, channels, device)


@triton.jit
def store_partial_statistics(partial_ptr, v, inside, tile, tiles, count, channel, channels, valid):
    """Mean, remainder and M2 of the ``count`` rows ``inside`` an fp32 block v [rows, channels], as tile ``tile``'s."""
    mean = tl.sum(tl.where(inside, v, 0.0), 0) / count
    d = tl.where(inside, v - mean[None, :], 0.0)
    remainder = tl.sum(d, 0) / count
    m2 = tl.sum(d * d, 0) - count * remainder * remainder
    place = partial_ptr + tile * channels + channel
    plane = tiles * channels
    tl.store(place, mean, mask=valid)
    tl.store(place + plane, remainder, mask=valid)
    tl.store(place + 2 * plane, m2, mask=valid)


@triton.jit(do_not_specialize=("tiles", "rows", "unit", "out_tiles"))
def _merge_kernel(
    partial_ptr, out_ptr, tiles, channels, rows, unit, out_tiles,
    FINAL: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    tile = group * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    valid = channel < channels
    # In 64 bits: the tiles beyond the last one may lie beyond 2^31 rows.
    left = rows - tile.to(tl.int64) * unit
    count = tl.minimum(tl.maximum(left, 0), unit).to(tl.float32)[:, None]
    inside = (tile < tiles)[:, None] & valid[None, :]
    place = partial_ptr + tile[:, None] * channels + channel[None, :]
    plane = tiles * channels
    means = tl.load(place, mask=inside, other=0.0)
    remainders = tl.load(place + plane, mask=inside, other=0.0)
    m2s = tl.load(place + 2 * plane, mask=inside, other=0.0)
    # Means are taken from the first tile's on: the differences are exact where the means agree in their leading digits.
    origin = tl.load(partial_ptr + group * BT * channels + channel, mask=valid, other=0.0)
    shifts = (means - origin[None, :]) + remainders
    total = tl.sum(count, 0)
    shift = tl.sum(count * shifts, 0) / total
    d = shifts - shift[None, :]
    m2 = tl.sum(m2s + count * d * d, 0)
    mean = origin + shift
    out = out_ptr + group * channels + channel
    plane = out_tiles * channels
    tl.store(out, mean, mask=valid)
    if FINAL:
        tl.store(out + plane, m2 / total, mask=valid)
    else:
        tl.store(out + plane, (origin - mean) + shift, mask=valid)
        tl.store(out + 2 * plane, m2, mask=valid)


def merge_statistics(partial: Tensor, rows: int, unit: int) -> tuple[Tensor, Tensor]:
    """(mean, biased variance), each [C] fp32, from ``partial`` [3, tiles, C] of tiles of ``unit`` rows."""
    while True:
        _, count, channels = partial.shape
        tile = tiles.merge(count, channels)
        groups = triton.cdiv(count, tile.rows)
        out = partial_sums(2 if groups == 1 else 3, groups, channels, partial.device)
        launch(
            _merge_kernel, (groups, triton.cdiv(channels, tile.channels)),
            partial, out, count, channels, rows, unit, groups,
            FINAL=groups == 1, BT=tile.rows, BC=tile.channels, warps=tile.warps,
        )  # fmt: skip
        if groups == 1:
            mean, var = out.view(2, channels).unbind()
            return mean, var
        partial, unit = out, unit * tile.rows
