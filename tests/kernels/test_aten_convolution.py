"""ATen's convolution backward where oneDNN's is faulty."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch

from bnrestructure.core.edges import ConvGeometry
from bnrestructure.kernels.aten_convolution import _has_idle_positions, convolution_backward


def test_idle_positions_are_those_that_no_output_reads() -> None:
    seen = set()
    for n, k, stride, padding, dilation in product(range(1, 7), range(1, 6), (1, 2, 3), range(5), (1, 2, 3)):
        geometry = ConvGeometry((1, stride), (0, padding), (1, dilation), 1)
        outputs = geometry.output_size((1, n), (1, k))[1]
        if outputs < 1:
            continue
        read = [any(0 <= o * stride - padding + i * dilation < n for o in range(outputs)) for i in range(k)]
        found = _has_idle_positions(geometry, torch.empty(1, 1, 1, n), torch.empty(1, 1, 1, k))
        assert found is not all(read), (n, k, geometry)
        seen.add(found)
    assert seen == {False, True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "kernel", "channels"), [(1, 5, 180), (2, 7, 180), (1, 3, 16)])
def test_idle_positions_have_a_zero_gradient(dtype: torch.dtype, size: int, kernel: int, channels: int) -> None:
    geometry = ConvGeometry((1, 1), (kernel // 2,) * 2, (1, 1), 1)
    x, dy = torch.randn(2, channels, size, size), torch.randn(2, channels - 6, size, size)
    weight = torch.randn(channels - 6, channels, kernel, kernel) / (channels * kernel)
    truth = convolution_backward(dy.double(), x.double(), weight.double(), geometry, need_input=True, need_weight=True)
    torch.full_like(weight, 1e30)  # what freed memory may hold
    found = convolution_backward(dy.to(dtype), x.to(dtype), weight.to(dtype), geometry, need_input=True, need_weight=True)
    for value, exact in zip(found, truth, strict=True):
        assert value is not None
        assert exact is not None
        assert value.dtype is dtype
        assert (value.double() - exact).abs().max() < 0.02 * exact.abs().max()
    weights, exact = found[1], truth[1]
    assert weights is not None
    idle = exact == 0
    assert idle.any() == (kernel > 2 * size - 1)
    assert not weights[idle].any()


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3), (5, 1, 1)])
def test_weight_gradients_of_shallow_volumes_are_written_whole(depth: int, kernel: tuple[int, int, int]) -> None:
    geometry = ConvGeometry((1, 1, 1), (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2), (1, 1, 1), 1)
    x, dy, weight = torch.randn(2, 6, depth, 4, 8), torch.randn(2, 8, depth, 4, 8), torch.randn(8, 6, *kernel)
    _, exact = convolution_backward(dy.double(), x.double(), weight.double(), geometry, need_input=False, need_weight=True)
    operands = [t.bfloat16().contiguous(memory_format=torch.channels_last_3d) for t in (dy, x, weight)]
    assert exact is not None
    for _ in range(6):
        freed = [torch.full((weight.numel() * n,), float("nan"), dtype=torch.bfloat16) for n in (1, 2, 3)]
        del freed
        _, found = convolution_backward(*operands, geometry, need_input=False, need_weight=True)
        assert found is not None
        assert (found.double() - exact).abs().max() < 0.02 * exact.abs().max()


#: oneDNN's weight gradient ends such a process, or changes what lies beside its workspace (its issue 6035).
STRIDED = """
import torch
from bnrestructure.kernels.aten_convolution import convolution_backward
from bnrestructure.core.edges import ConvGeometry

torch.set_num_threads(1)
geometry = ConvGeometry((2, 2), (0, 0), (1, 1), 1)
for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
    for channels, size in ((3, 224), (15, 97), (8, 160)):
        for _ in range(8):
            last = torch.channels_last
            x = torch.randn(2, channels, size, size).to(dtype).contiguous(memory_format=last)
            dy = torch.randn(2, 64, (size + 1) // 2, (size + 1) // 2).to(dtype).contiguous(memory_format=last)
            weight = torch.randn(64, channels, 1, 1).to(dtype)
            others = [torch.full((n,), 7.0) for n in (100, 1000, 10000, 100000)]
            found = convolution_backward(dy, x, weight, geometry, need_input=True, need_weight=True)
            wide = (t.double() for t in (dy, x, weight))
            truth = convolution_backward(*wide, geometry, need_input=True, need_weight=True)
            for value, exact in zip(found, truth, strict=True):
                assert value.dtype is dtype
                assert (value - exact).abs().max() < tolerance * exact.abs().max()
            assert all((t == 7).all() for t in others)
"""


def test_strided_pointwise_weight_gradients_stay_within_their_memory() -> None:
    found = subprocess.run([sys.executable, "-c", STRIDED], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
