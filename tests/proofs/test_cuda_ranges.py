"""The CUDA kernels' index arithmetic: what patches meet, how far tiles reach, and that offsets of 32 bits hold what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bnrestructure.kernels.calls import StatisticsForward
from bnrestructure.kernels.cuda import layout, limits, patches, tiles
from bnrestructure.kernels.cuda.layout import _at

CHANNELS = (*range(1, 260), 384, 512, 1000, 1024, 2048, 4096)


def test_a_patch_of_outputs_reads_what_its_outputs_read() -> None:
    """Along one dimension: (output, input, tap) of a patch as the kernel walks it, and as the convolution has it."""
    for size, stride, kernel, dilation in product(range(1, 5), range(1, 5), range(1, 8), range(1, 4)):
        expected = {(o, o * stride + tap * dilation, tap) for o in range(size) for tap in range(kernel)}
        found = {
            (output, place, patches.tap_at(place - output * stride, dilation, kernel))
            for place in range((size - 1) * stride + (kernel - 1) * dilation + 1)
            if patches.is_any_read(place, size, stride, kernel, dilation)
            for output in range(size)
            if patches.tap_at(place - output * stride, dilation, kernel) >= 0
        }
        assert found == expected, (size, stride, kernel, dilation)


def test_a_patch_of_inputs_meets_the_outputs_that_read_it() -> None:
    """(input, output, tap) of a patch that starts at a multiple of the stride; outputs before number 0 are negative."""
    for multiple, stride, kernel, dilation, padding in product(range(1, 3), range(1, 4), range(1, 6), range(1, 3), range(5)):
        size = multiple * stride
        expected = {
            (own, output, tap)
            for own, output, tap in product(range(size), range(-20, 20), range(kernel))
            if output * stride + tap * dilation == own + padding
        }
        found = {
            (own, output, patches.tap_at(own + padding - output * stride, dilation, kernel))
            for output in range(patches.first_read(stride, padding, kernel, dilation), patches.last_read(size, stride, padding) + 1)
            for own in range(size)
            if patches.tap_at(own + padding - output * stride, dilation, kernel) >= 0
        }
        assert found == expected, (size, stride, kernel, dilation, padding)


def test_patches_cover_an_image() -> None:
    for h, w, height, width in product(range(1, 8), range(1, 8), range(1, 4), range(1, 5)):
        starts = {(i // height, j // width) for i in range(h) for j in range(w)}
        assert patches.patches_in((h, w), height, width) == len(starts)


def _depthwise_tiles() -> Iterator[tuple[tiles.PatchTile, tuple[int, int]]]:
    """Each kind of patch, with its stride."""
    for channels, size, k, s in product((1, 3, 8, 16, 24, 40, 64, 72, 200, 1000), (1, 2, 3, 7, 56), range(1, 12), range(1, 6)):
        shape, kernel, stride = (size, size + 1), (k, min(k + 1, 11)), (s, s)
        yield tiles.depthwise_forward(channels, shape, kernel, stride, 2), (1, 1)
        yield tiles.depthwise_forward(channels, shape, kernel, stride, 4), (1, 1)
        yield tiles.depthwise_dgrad(channels, shape, kernel, stride), stride
        yield tiles.depthwise_wgrad(channels, shape, kernel, stride), (1, 1)


def test_patches_of_inputs_are_whole_multiples_of_the_stride() -> None:
    """Across, where every pixel of a patch must meet the same taps; down, too, unless the kernel walks row by row."""
    for tile, stride in _depthwise_tiles():
        assert tile.width % stride[1] == 0
        assert tile.height % stride[0] == 0 or not tile.unrolled or stride == (1, 1)


def _reach() -> int:
    """How many rows beyond a tensor's last one a tile may reach, at the most."""
    sweeps = [rule(c) for c in CHANNELS for rule in (tiles.sweep, tiles.statistics, tiles.max_pool)]
    rows = {tile.rows for tile in sweeps}
    flags = (False, True)
    for n, c, depth, element in product((1, 64, 128 * 64, 128 * 128, 10**6), (1, 16, 31, 64, 128, 1000), (3, 64, 1000), (2, 4)):
        for gathered, heavy, joined in product(flags, flags, flags):
            rows.add(tiles.dense_forward(n, c, depth, element, gathered, heavy, joined).m)
            rows.add(tiles.dense_dgrad(n, c, depth, element, heavy, joined).m)
            rows.add(tiles.dense_wgrad(c, depth, element, gathered, heavy).k)
    rows |= {tile.rows * tile.height * tile.width for tile, _ in _depthwise_tiles()}
    return max(rows)


def test_narrow_offsets_fit() -> None:
    """Where Pixels calls for no 64 bits, the largest offset that a tile forms is below 2^31: for every pitch.

    Not wide is (rows + 2^12) * pitch < 2^31. A tile's last row is before rows + reach, its last channel at most 63 beyond the pitch: the
    largest offset is below (rows + reach) * pitch + 63, and that is below 2^31 if (2^12 - reach) * pitch is at least 63.
    """
    reach = _reach()
    assert 2**12 - reach >= 63
    for pitch in (1, 2, 3, 64, 1000, 2**20, 2**30):
        most = (2**31 - 1) // pitch - 2**12  # rows of the largest tensor that is not wide
        for rows, wide in ((most, False), (most + 1, True)):
            if rows < 1:
                continue
            x = torch.empty(1, 1, 1, rows, device="meta")
            assert _at(x, pitch).wide is wide
            assert wide or (rows + reach) * pitch + 63 < 2**31


def test_numbers_of_rows_fit() -> None:
    """A row's number, and that of the last tile's rows beyond it, have 32 bits in every tensor that the rules let in."""
    limit = limits._MOST_ROWS
    assert limit + _reach() < 2**31
    for rows, refused in ((limit, False), (limit + 1, True)):
        x = torch.empty(1, 1, 1, rows, device="meta")
        reason = limits.supports(StatisticsForward(x))
        assert (reason is not None) is refused, reason
    assert layout._REACH == 2**31
