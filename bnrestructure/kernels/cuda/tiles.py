"""Which tile each kernel runs with: one rule per kernel, from the shape and the element size; nothing is measured.

The rules keep every tile within the registers of sm_80 and sm_90 and within the shared memory of the smallest part
(99 KB on sm_86, sm_89 and sm_120); the table of compile_ahead.py checks that. Tiles are powers of two, at least 16
for a tensor core.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "DotTile",
    "SweepTile",
    "dense_dgrad",
    "dense_forward",
    "dense_wgrad",
    "depthwise",
    "depthwise_wgrad",
    "merge",
    "splits",
    "steps_per_split",
    "sweep",
]

#: Programs that keep the largest parts busy: a few for each of some 140 multiprocessors.
_ENOUGH_PROGRAMS = 512


class DotTile(NamedTuple):
    """A tile of a matrix product: [m, n] results, k deep at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class SweepTile(NamedTuple):
    """A tile of an elementwise kernel: rows (pixels) by channels."""

    rows: int
    channels: int
    warps: int


def _power(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, within [low, high] (both powers of two)."""
    return min(max(1 << (max(n, 1) - 1).bit_length(), low), high)


def _width(channels: int, widest: int) -> int:
    """Channels of an elementwise tile: the widest power of two that is not mostly beyond the last channel, 16 where there are many.

    Each lane beyond costs as much as one within: 72 channels are five tiles of 16 and eight lanes, or two of 64 and 56.
    """
    widths = [width for width in (64, 32, 16) if width <= widest]
    padded = {width: -(-channels // width) * width for width in widths}
    least = min(padded.values())
    return _power(channels, 8, next(width for width in widths if padded[width] <= 1.15 * least))


def dense_forward(
    rows: int, channels: int, depth: int, element: int, gathered: bool, heavy: bool, joined: bool
) -> DotTile:
    """``rows`` pixels by ``channels`` outputs, ``depth`` input channels (all taps of them when ``gathered``).

    ``heavy``: the prologue or the epilogue needs many registers (see problem.is_heavy); ``joined``: it forms a residual join's sum.
    """
    n = _power(channels, 16, 128)
    m = 128 if rows >= 128 * 128 else 64
    k = _power(depth, 16, 128 // element)
    if gathered:  # every element has its own address: fewer of them in flight
        return DotTile(m, min(n, 64), min(k, 32), 8 if m == 128 else 4, 2)
    if joined:  # two streams are read and a third is written: wide tiles read them less often
        m = 128 if rows >= 64 * 128 and not heavy else 64
        return DotTile(m, min(n, 64) if heavy else n, min(k, 64 // element), 8 if n >= 64 else 4, 2)
    if heavy:
        return DotTile(m, n, min(k, 64 // element), 8 if m * n >= 128 * 64 else 4, 2)
    # A narrow tile is nearly all left operand: with four warps Triton 3.6 spills its addresses on sm_80.
    return DotTile(m, n, k, 8 if m * n >= 128 * 128 or (m == 128 and n <= 32) else 4, 3)


def dense_dgrad(rows: int, channels: int, depth: int, element: int, heavy: bool, joined: bool) -> DotTile:
    """``rows`` input pixels by ``channels`` inputs, ``depth`` output channels; two streams feed the left operand.

    ``joined``: the epilogue finishes a residual join's gradient, from four tensors.
    """
    n = _power(channels, 16, 64 if heavy else 128)
    k = _power(depth, 16, 128 // element)
    if joined:
        return DotTile(64, n, min(k, 64 // element) if heavy else k, 8 if n == 128 or heavy else 4, 2)
    if n == 128:  # 128 x 128 spills on sm_90 with Triton 3.6
        return DotTile(64, n, k, 4, 2)
    m, k = 128 if rows >= 128 * 128 else 64, min(k, 64 // element)
    return DotTile(m, n, k, 8 if heavy and m * n >= 128 * 64 else 4, 2 if heavy else 3)


def dense_wgrad(out_channels: int, columns: int, element: int, gathered: bool, heavy: bool) -> DotTile:
    """``out_channels`` by ``columns`` (input channels, times the taps when ``gathered``), deep over the pixels."""
    m = _power(out_channels, 16, 128)
    if m == 32:  # 64 rows is the least that sm_90's warp-group instructions take
        m = 64
    n = _power(columns, 16, 64 if gathered else 128)
    k = min(64 if element == 2 else 16, 32 if gathered or heavy else 64)
    return DotTile(m, n, k, 8 if m * n >= 128 * 64 else 4, 2)


def splits(programs: int, steps: int, least: int = 8) -> int:
    """Into how many parts, of ``least`` steps or more, to cut a reduction of ``steps``, so that ``programs`` times that fill a device."""
    return max(1, min(_ENOUGH_PROGRAMS // max(programs, 1), steps // least))


def steps_per_split(tile: DotTile, element: int) -> int:
    """Steps of a weight gradient's reduction that read four times the bytes that its partial result takes to write and to read again."""
    return max(8, -(-4 * 2 * 4 * tile.m * tile.n // (tile.k * (tile.m + tile.n) * element)))


def sweep(channels: int) -> SweepTile:
    """An elementwise kernel over [rows, channels]."""
    width = _width(channels, 64)
    return SweepTile(8192 // width, width, 8)


def depthwise(channels: int, streams: int) -> SweepTile:
    """Output pixels by channels of a depthwise convolution (one stream), or input pixels of its dgrad (two streams)."""
    width = _width(channels, 64)
    # Two streams: with more threads in a block the one or the other version of Triton spills; fewer rows mean more partial sums.
    return SweepTile(4096 // width, width, 8) if streams == 1 else SweepTile(2048 // width, width, 4)


def depthwise_wgrad(channels: int, taps: int) -> SweepTile:
    """Pixels at a time by channels; the accumulator holds this for every tap."""
    width = _width(channels, 32)
    return SweepTile(max(1, 8192 // (width * _power(taps, 1, 4096))), width, 4)


def merge(count: int, channels: int) -> SweepTile:
    """Tiles to merge at a time, by channels."""
    return SweepTile(_power(count, 1, 128), _power(channels, 8, 32), 4)
