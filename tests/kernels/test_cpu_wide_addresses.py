"""Tensors that reach beyond 2^31 elements: every kernel gives what it gives on a compact copy.

The tensors are channel slices of one buffer of 2.4e9 values, bfloat16 or float32, whose pixels lie eight million elements apart. The
buffer is a sparse file: only the pages that the slices touch exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_kernels
from torch import Tensor
from torch.utils import _pytree as pytree

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, PoolGeometry, Transform
from bnrestructure.kernels.calls import (
    ConvBackward,
    ConvForward,
    JoinBackward,
    JoinForward,
    MaxPoolBackward,
    MaxPoolForward,
    NormaliseBackward,
    NormaliseForward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.cpu import KERNELS as CPU
from bnrestructure.kernels.layout import pitch_of

pytestmark = needs_kernels

N, SIZE, CHANNELS, PITCH = 2, 12, 16, 2**23
DTYPE = torch.bfloat16


class Buffer:
    """Channel slices of the buffer, each used once."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        elements = N * SIZE * SIZE * PITCH
        path.touch()
        flat = torch.from_file(str(path), shared=True, size=elements, dtype=dtype)
        self.dtype = dtype
        self._pixels = flat.view(N, SIZE, SIZE, PITCH).permute(0, 3, 1, 2)
        self._used = 0

    def holding(self, values: Tensor) -> Tensor:
        """A slice with these values."""
        n, c, h, w = values.shape
        assert (n, c, h, w) == (N, CHANNELS, SIZE, SIZE)
        self._used += 64  # pages of their own: PITCH is a multiple of the page size
        return self._pixels.narrow(1, self._used, CHANNELS).copy_(values)


@pytest.fixture
def buffer(tmp_path: Path, dtype: torch.dtype) -> Iterator[Buffer]:
    path = tmp_path / "values"
    yield Buffer(path, dtype)
    path.unlink()


@pytest.fixture
def dtype() -> torch.dtype:
    return DTYPE


def values(dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(N, CHANNELS, SIZE, SIZE).to(dtype).contiguous(memory_format=torch.channels_last)


def transform() -> Transform:
    return Transform(torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS), "relu")


def edge(y: Tensor) -> BackwardEdge:
    return BackwardEdge(None, torch.randn(CHANNELS) * 0.01, torch.randn(CHANNELS), y, torch.randn(CHANNELS))


def check(buffer: Buffer, call: Callable[[list[Tensor]], Any], count: int) -> None:
    """``call`` of ``count`` activations gives the same, bit for bit, for slices of the buffer and for compact copies."""
    compact = [values(buffer.dtype) for _ in range(count)]
    wide = [buffer.holding(x) for x in compact]
    assert all(pitch_of(x) == PITCH and (x.numel() // CHANNELS - 1) * PITCH > 2**31 for x in wide)
    results = []
    for tensors in (compact, wide):
        torch.manual_seed(1)
        results.append([t for t in pytree.tree_leaves(call(tensors)) if isinstance(t, Tensor)])
    assert len(results[0]) == len(results[1]) > 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


DENSE = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
POINTWISE = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
KERNELS = [
    pytest.param("fused", POINTWISE, (CHANNELS, CHANNELS, 1, 1), DTYPE, id="fused-1x1"),
    pytest.param("fused", DENSE, (CHANNELS, CHANNELS, 3, 3), DTYPE, id="fused-3x3"),
    pytest.param("hybrid", DENSE, (CHANNELS, CHANNELS, 3, 3), DTYPE, id="hybrid-3x3"),
    pytest.param("winograd", DENSE, (CHANNELS, CHANNELS, 3, 3), torch.float32, id="winograd-3x3"),
    pytest.param("depthwise", DENSE._replace(groups=CHANNELS), (CHANNELS, 1, 3, 3), DTYPE, id="depthwise-3x3"),
]


@pytest.mark.parametrize(("kernel", "geometry", "shape", "dtype"), KERNELS)
def test_convolution(
    kernel: str, geometry: ConvGeometry, shape: tuple[int, ...], dtype: torch.dtype, buffer: Buffer
) -> None:
    def forward(tensors: list[Tensor]) -> Any:
        x, out = tensors
        weight = torch.randn(shape)
        return CPU.convolutions.by(kernel).run(ConvForward(x, transform(), weight, None, geometry, dtype, True, out)), out

    def backward(tensors: list[Tensor]) -> Any:
        dy, y, x, dx = tensors
        weight = torch.randn(shape)
        options: dict[str, Any] = {"dtype": dtype, "needs": (True, True, True), "accumulate": dx}
        return tuple(CPU.convolutions.by(kernel).run(ConvBackward(dy, edge(y), x, transform(), weight, geometry, **options))), dx

    check(buffer, forward, 2)
    check(buffer, backward, 4)


def test_sweeps(buffer: Buffer) -> None:
    vector = torch.randn(CHANNELS)
    check(buffer, lambda t: CPU.run(StatisticsForward(t[0])), 1)
    check(buffer, lambda t: CPU.run(StatisticsBackward(t[0], vector, vector, vector, t[1])), 2)
    check(buffer, lambda t: (CPU.run(NormaliseForward(t[0], transform(), dtype=DTYPE, out=t[1])), t[1]), 2)
    check(buffer, lambda t: CPU.run(NormaliseBackward(t[0], t[1], transform(), accumulate=t[2])), 3)
    check(buffer, lambda t: CPU.run(SqueezeForward(t[0], transform(), dtype=DTYPE)), 1)


def test_residual_join(buffer: Buffer) -> None:
    vector = torch.randn(CHANNELS) * 0.01
    affine = Transform(vector, vector + 1, vector)
    check(buffer, lambda t: CPU.run(JoinForward(Join(t[0], affine, t[1], Transform(), "relu"), DTYPE, True)), 2)
    check(
        buffer,
        lambda t: CPU.run(JoinBackward(t[0], (vector,) * 3, Join(t[1], affine, t[2], Transform(), "relu"), t[3])),
        4,
    )


def test_max_pool(buffer: Buffer) -> None:
    geometry = PoolGeometry((3, 3), (1, 1), (1, 1), False)
    _, index = CPU.run(MaxPoolForward(values(), transform(), geometry, dtype=DTYPE))
    check(buffer, lambda t: CPU.run(MaxPoolForward(t[0], transform(), geometry, dtype=DTYPE)), 1)
    check(buffer, lambda t: CPU.run(MaxPoolBackward(t[0], index, t[1], transform(), geometry, accumulate=t[2])), 3)
