"""From the partial results of tiles to per-channel totals: Chan's formula for statistics, plain sums for gradients.

A tile's mean is kept as two numbers, the fp32 mean and what its rounding left out: where |mean| is large beside the
deviation, the rounding alone would show in the variance between tiles. Where tile i covers the rows from i * unit
up to (i + 1) * unit, the last one fewer, the counts need not be stored; tiles of patches store them. Nothing here is
atomic: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.unmerged import Mean, Unmerged, Wanted

__all__ = ["merge_statistics", "merged_tiles", "partial_statistics", "partial_sums", "store_partial_statistics"]


def partial_sums(planes: int, count: int, channels: int, device: torch.device) -> Tensor:
    """Room for ``planes`` sums of ``count`` tiles: [planes, count, C] fp32, uninitialised; sum(1) are the totals."""
    return torch.empty(planes, count, channels, dtype=torch.float32, device=device)


def partial_statistics(count: int, channels: int, device: torch.device) -> Tensor:
    """Room for what :func:`merge_statistics` merges, uninitialised: [3, count, C] of (mean, remainder, M2) by tile."""
    return partial_sums(3, count, channels, device)


@triton.jit
def store_partial_statistics(
    partial_ptr, blocks, inside, tile, tiles, count, channel, channels, valid, BLOCKS: tl.constexpr = 1
):  # fmt: skip
    """Mean, remainder and M2 of the ``count`` rows ``inside`` some fp32 blocks [rows, channels], as tile ``tile``'s. Of each a tuple."""
    total = tl.where(inside[0], blocks[0], 0.0)
    for i in tl.static_range(1, BLOCKS):
        total += tl.where(inside[i], blocks[i], 0.0)
    mean = tl.sum(total, 0) / count
    d = tl.where(inside[0], blocks[0] - mean[None, :], 0.0)
    square = d * d
    for i in tl.static_range(1, BLOCKS):
        more = tl.where(inside[i], blocks[i] - mean[None, :], 0.0)
        d += more
        square = tl.fma(more, more, square)
    remainder = tl.sum(d, 0) / count
    m2 = tl.sum(square, 0) - count * remainder * remainder
    place = partial_ptr + tile * channels + channel
    plane = tiles * channels
    tl.store(place, mean, mask=valid)
    tl.store(place + plane, remainder, mask=valid)
    tl.store(place + 2 * plane, m2, mask=valid)


@triton.jit
def merged_tiles(
    partial_ptr, count_ptr, first, last, tiles, channels, rows, unit, channel, valid, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """(origin, mean - origin, M2, rows) of the tiles from ``first`` up to ``last``, for some channels."""
    plane = tiles * channels
    # Means are taken from the first tile's on: the differences are exact where the means agree in their leading digits.
    origin = tl.load(partial_ptr + first * channels + channel, mask=valid, other=0.0)
    total = tl.zeros((1,), dtype=tl.float32)
    shift = tl.zeros((BC,), dtype=tl.float32)
    m2 = tl.zeros((BC,), dtype=tl.float32)
    for start in range(first, last, BT):
        tile = start + tl.arange(0, BT)
        if count_ptr is not None:
            count = tl.load(count_ptr + tile, mask=tile < last, other=0.0)[:, None]
        else:  # in 64 bits: the tiles beyond the last one may lie beyond 2^31 rows
            left = rows - tile.to(tl.int64) * unit
            count = tl.where(tile < last, tl.minimum(tl.maximum(left, 0), unit), 0).to(tl.float32)[:, None]
        inside = (tile < last)[:, None] & valid[None, :]
        place = partial_ptr + tile[:, None] * channels + channel[None, :]
        means = tl.load(place, mask=inside, other=0.0)
        remainders = tl.load(place + plane, mask=inside, other=0.0)
        m2s = tl.load(place + 2 * plane, mask=inside, other=0.0)
        shifts = (means - origin[None, :]) + remainders
        more = tl.sum(count, 0)
        more_shift = tl.sum(count * shifts, 0) / more
        d = shifts - more_shift[None, :]
        apart = more_shift - shift
        share = more / (total + more)
        m2 += tl.sum(m2s + count * d * d, 0) + apart * apart * (total * share)
        shift += apart * share
        total += more
    return origin, shift, m2, total


@triton.jit(do_not_specialize=("tiles", "rows", "unit", "span", "out_tiles"))
def _merge_kernel(
    partial_ptr, count_ptr, out_ptr, out_count_ptr, tiles, channels, rows, unit, span, out_tiles,
    FINAL: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    first = group * span
    last = tl.minimum(first + span, tiles)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    valid = channel < channels
    origin, shift, m2, total = merged_tiles(
        partial_ptr, count_ptr, first, last, tiles, channels, rows, unit, channel, valid, BT, BC
    )  # fmt: skip
    mean = origin + shift
    out = out_ptr + group * channels + channel
    plane = out_tiles * channels
    tl.store(out, mean, mask=valid)
    if FINAL:
        tl.store(out + plane, m2 / total, mask=valid)
    else:
        tl.store(out + plane, (origin - mean) + shift, mask=valid)
        tl.store(out + 2 * plane, m2, mask=valid)
        if count_ptr is not None:
            tl.store(out_count_ptr + group, tl.sum(total, 0))


def merge_statistics(found: Unmerged | None, wanted: Wanted = True) -> tuple[Mean, Tensor | None]:
    """(mean, biased variance), each [C] fp32, of fp32 tiles; (None, None) without any.

    Tiles that may stay unmerged are merged until one launch can do the rest: (what is left to merge, None) then.
    """
    if found is None:
        return None, None
    partial, rows, unit, counts = found
    while True:
        _, count, channels = partial.shape
        tile, span = tiles.merge(count, channels)
        groups = tiles.cdiv(count, span)
        if groups == 1 and wanted == "unmerged":
            return Unmerged(partial, rows, unit, counts), None
        out = partial_sums(2 if groups == 1 else 3, groups, channels, partial.device)
        merged = None if counts is None or groups == 1 else torch.empty(groups, dtype=torch.float32, device=partial.device)
        launch(
            _merge_kernel, (groups, tiles.cdiv(channels, tile.channels)),
            partial, counts, out, merged, count, channels, rows, unit, span, groups,
            FINAL=groups == 1, BT=tile.rows, BC=tile.channels, warps=tile.warps,
        )  # fmt: skip
        if groups == 1:
            mean, var = out.view(2, channels).unbind()
            return mean, var
        partial, counts, unit = out, merged, unit * span
