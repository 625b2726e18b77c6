"""Which tile each kernel runs with: one rule per kernel, from the shape and the element size; nothing is measured.

The rules keep every tile within the registers of sm_80 and sm_90 and within the shared memory of the smallest part
(99 KB on sm_86, sm_89 and sm_120); the table of compile_ahead.py checks that. Tiles are powers of two, at least 16
for a tensor core.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "READ_BY_ONE",
    "DotTile",
    "PatchTile",
    "SweepTile",
    "cdiv",
    "dense_dgrad",
    "dense_forward",
    "dense_wgrad",
    "depthwise_dgrad",
    "depthwise_forward",
    "depthwise_wgrad",
    "max_pool",
    "max_pool_backward",
    "merge",
    "splits",
    "statistics",
    "steps_per_split",
    "sums",
    "sweep",
]

#: A training step asks the same questions each time.
_remembered = lru_cache(maxsize=4096)
#: Programs that keep the largest parts busy: a few for each of some 140 multiprocessors.
_ENOUGH_PROGRAMS = 512
#: Depthwise kernels of so many taps have code of their own for each; larger ones a loop over the rows of taps.
_UNROLLED_TAPS = 25


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own asks for compile-time constants first."""
    return -(-a // b)


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


class PatchTile(NamedTuple):
    """A tile of a depthwise kernel: rows of patches (patches.py), each ``height`` x ``width`` pixels, by channels."""

    rows: int
    channels: int
    warps: int
    height: int
    width: int
    unrolled: bool

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' compile-time arguments."""
        return {"UNROLLED": self.unrolled, "HEIGHT": self.height, "WIDTH": self.width, "BR": self.rows, "BC": self.channels}


#: So many tiles' numbers one program reads, 512 at a time, in about what another launch and its gap take: four times memory's latency.
READ_BY_ONE = 2048


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


@_remembered
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
        m = 128 if rows >= 64 * 128 and n < 128 and not heavy else 64
        return DotTile(m, min(n, 64) if heavy else n, min(k, 64 // element), 8 if n >= 64 else 4, 2)
    if heavy:
        return DotTile(m, n, min(k, 64 // element), 8 if m * n >= 128 * 64 else 4, 2)
    if n == 128 and m == 128:  # half a step at a time leaves room for two programs on a multiprocessor
        return DotTile(m, n, min(k, 64 // element), 8, 4)
    # A narrow tile is nearly all left operand: with four warps Triton 3.6 spills its addresses on sm_80.
    return DotTile(m, n, k, 8 if m * n >= 128 * 128 or (m == 128 and n <= 32) else 4, 3)


@_remembered
def dense_dgrad(rows: int, channels: int, depth: int, element: int, heavy: bool, joined: bool) -> DotTile:
    """``rows`` input pixels by ``channels`` inputs, ``depth`` output channels; two streams feed the left operand.

    ``joined``: the epilogue finishes a residual join's gradient, from four tensors.
    """
    n = _power(channels, 16, 64 if heavy else 128)
    k = _power(depth, 16, 128 // element)
    if joined:  # its operands are read before the product, so that wide tiles would leave room for one program on a multiprocessor
        return DotTile(64, min(n, 64), min(k, 64 // element) if heavy else k, 8 if heavy else 4, 2)
    if n == 128:
        return DotTile(64, n, k, 4, 2)
    m, k = 128 if rows >= 128 * 128 else 64, min(k, 64 // element)
    return DotTile(m, n, k, 8 if heavy and m * n >= 128 * 64 else 4, 2 if heavy else 3)


@_remembered
def dense_wgrad(out_channels: int, columns: int, element: int, gathered: bool, heavy: bool) -> DotTile:
    """``out_channels`` by ``columns`` (input channels, times the taps when ``gathered``), deep over the pixels."""
    m = _power(out_channels, 16, 128)
    if m == 32:  # 64 rows is the least that sm_90's warp-group instructions take
        m = 64
    n = _power(columns, 16, 64 if gathered else 128)
    k = min(64 if element == 2 else 16, 32 if gathered or heavy else 64)
    return DotTile(m, n, k, 8 if m * n >= 128 * 64 else 4, 2)


@_remembered
def splits(programs: int, steps: int, least: int = 8) -> int:
    """Into how many parts, of ``least`` steps or more, to cut a reduction of ``steps``, so that ``programs`` times that fill a device."""
    return max(1, min(_ENOUGH_PROGRAMS // max(programs, 1), steps // least))


@_remembered
def steps_per_split(tile: DotTile, element: int) -> int:
    """Steps of a weight gradient's reduction that read four times the bytes that its partial result takes to write and to read again."""
    return max(8, -(-4 * 2 * 4 * tile.m * tile.n // (tile.k * (tile.m + tile.n) * element)))


@_remembered
def sweep(channels: int) -> SweepTile:
    """An elementwise kernel over [rows, channels]."""
    width = _width(channels, 64)
    return SweepTile(8192 // width, width, 8)


@_remembered
def statistics(channels: int) -> SweepTile:
    """The sweep that only reads. What it adds up among threads would take longer than memory does: few threads, with more rows each."""
    width = _width(channels, 64)
    return SweepTile(8192 // width, width, 4)


@_remembered
def max_pool(channels: int) -> SweepTile:
    """Pixels by channels of a max pool's outputs: the largest value and its place."""
    width = _width(channels, 64)
    return SweepTile(2048 // width, width, 4)


@_remembered
def max_pool_backward(channels: int) -> SweepTile:
    """Pixels by channels of a max pool's inputs: twice as many rows, since their sums cost as much for few."""
    width = _width(channels, 64)
    return SweepTile(4096 // width, width, 4)


def _patches(channels: int, height: int, width: int, unrolled: bool, elements: int) -> PatchTile:
    """Four warps, ``elements`` channels for each thread: 4, or 2 where a lane keeps so much that there are no registers for 4."""
    columns = _width(channels, 32)
    return PatchTile(128 * elements // columns, columns, 4, height, width, unrolled)


@_remembered
def depthwise_forward(
    channels: int, size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], element: int
) -> PatchTile:
    """Patches of outputs; ``size`` is that of the output, ``element`` the bytes of a number."""
    unrolled = kernel[0] * kernel[1] <= _UNROLLED_TAPS
    height = 2 if unrolled and stride[0] <= 2 and size[0] > 1 else 1
    widest = {1: 4, 2: 2}.get(stride[1], 1) if unrolled else {1: 16 // element, 2: 4}.get(stride[1], 1)
    width = _power(size[1], 1, widest)
    return _patches(channels, height, width, unrolled, 4 if kernel[1] <= 5 or (kernel[1] <= 7 and stride[1] == 1) else 2)


@_remembered
def depthwise_dgrad(channels: int, size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]) -> PatchTile:
    """Patches of inputs, whole multiples of the stride, so that every patch meets the same taps; ``size`` is that of the input."""
    taps, strides = kernel[0] * kernel[1], stride[0] * stride[1]
    unrolled = taps <= min(9 * strides, _UNROLLED_TAPS) and strides <= 4
    height = 1 if not unrolled else stride[0] if stride[0] > 1 else _power(size[0], 1, 2)
    widest = {1: 4 if unrolled else 8, 2: 2}.get(stride[1], 1)
    width = stride[1] * _power(size[1] // stride[1], 1, widest)
    return _patches(channels, height, width, unrolled, 4 if kernel[1] <= 7 and width <= 8 else 2)


@_remembered
def depthwise_wgrad(channels: int, size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]) -> PatchTile:
    """Patches of outputs at a time; a lane keeps a sum for every tap, or for those of one row of them."""
    unrolled = kernel[0] * kernel[1] <= _UNROLLED_TAPS
    height = 2 if unrolled and stride[0] <= 2 and size[0] > 1 else 1
    width = _power(size[1], 1, {1: 4, 2: 2}.get(stride[1], 1))
    sums = (kernel[0] if unrolled else 1) * kernel[1]
    return _patches(channels, height, width, unrolled, 4 if sums <= 9 else 2)


@_remembered
def merge(count: int, channels: int) -> tuple[SweepTile, int]:
    """Tiles to merge at a time, by channels; and how many of them one program merges: all, unless that took longer than a second launch."""
    if 128 < count <= READ_BY_ONE:
        return SweepTile(_power(count, 256, 512), 8, 8), count  # 8 channels are one sector of memory
    tile = SweepTile(_power(count, 1, 128), _power(channels, 8, 32), 4)
    return tile, min(count, tile.rows)


@_remembered
def sums(count: int, inner: int) -> SweepTile:
    """Tiles whose sums to add at a time, by columns: 4096 numbers, 16 of each thread, in sectors of 8 at least."""
    rows = _power(count, 1, 512)
    return SweepTile(rows, _power(inner, 8, 4096 // rows), 8)
