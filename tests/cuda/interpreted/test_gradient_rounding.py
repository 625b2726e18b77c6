"""Corrections far below the last place of a narrow gradient are kept on average (kernels/rounding.py), as by the reference kernels."""

from __future__ import annotations

import pytest
import torch
from small_corrections import kept, total
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.kernels.calls import ConvBackward, JoinBackward, SqueezeBackward, StatisticsBackward
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.reference import REFERENCE

N, CHANNELS, SIZE = 2, 24, 16
NARROW = [torch.bfloat16, torch.float16]


def activation(dtype: torch.dtype, channels: int = CHANNELS) -> Tensor:
    return torch.randn(N, channels, SIZE, SIZE).to(dtype).contiguous(memory_format=torch.channels_last)


def correction(dtype: torch.dtype, y: Tensor) -> BackwardEdge:
    """A constant of a fifth of a unit in the last place of P, in every channel with a sign of its own."""
    b = torch.where(torch.arange(CHANNELS) % 2 == 0, 1.0, -1.0) * torch.finfo(dtype).eps / 5
    return BackwardEdge(None, torch.zeros(CHANNELS), b, y, torch.zeros(CHANNELS))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("kernel", "depthwise"),
    [("fused", False), ("depthwise", True), ("hybrid", False)],
    ids=["dense", "depthwise", "hybrid"],
)
def test_convolution_backward(dtype: torch.dtype, kernel: str, depthwise: bool) -> None:
    p, y = activation(dtype), activation(dtype)
    p = p.sign() * (1 + p.abs() % 1).to(dtype)  # from 1 to 2: all of one unit
    edge = correction(dtype, y)
    inputs = CHANNELS if depthwise else 16
    x = torch.ones_like(activation(dtype, inputs))
    weight = torch.full((CHANNELS, 1, 1, 1), 1.5) if depthwise else torch.randn(CHANNELS, 16, 1, 1).to(dtype).float()
    found = KERNELS.convolutions.by(kernel).run(ConvBackward(
        p, edge, x, Transform(), weight, ConvGeometry((1, 1), (0, 0), (1, 1), CHANNELS if depthwise else 1),
        dtype=dtype, needs=(True, True, False),
    ))  # fmt: skip
    assert edge.b is not None
    before, exact = total(p), total(p) + edge.b.double() * (N * SIZE * SIZE)
    matrix = torch.eye(CHANNELS).double() * 1.5 if depthwise else weight.double().view(CHANNELS, 16)
    assert 0.8 < kept(total(found.dx), before @ matrix, exact @ matrix) < 1.2
    of_ones = found.weight.double().view(CHANNELS, -1)[:, 0]  # the input is 1: the weight gradient is the sum of dY
    assert 0.8 < kept(of_ones, before, exact) < 1.2


@pytest.mark.parametrize("dtype", NARROW)
def test_sweeps_dither_as_the_reference_does(dtype: torch.dtype) -> None:
    p, y, r = activation(dtype), activation(dtype), activation(dtype)
    p[0, :5, 0, 0] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    vector = torch.randn(CHANNELS) * 1e-3
    found, wanted = (k.run(StatisticsBackward(y, vector, vector, vector, p.clone())) for k in (KERNELS, REFERENCE))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    call = JoinBackward(p, (vector, vector, vector), Join(y, Transform(), r, Transform(), "relu"), y)
    found, wanted = (k.run(call).g for k in (KERNELS, REFERENCE))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    pooled = torch.randn(N, CHANNELS)
    for dz in (None, p):
        found, wanted = (k.run(SqueezeBackward(pooled, dz, y, Transform())).dx for k in (KERNELS, REFERENCE))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW)
def test_squeeze_backward(dtype: torch.dtype) -> None:
    """All pixels of an image have the same share of an average's gradient; rounded alike, they would all lose the same."""
    unit = torch.finfo(dtype).eps
    pooled = torch.full((N, CHANNELS), (1 + unit / 5) * SIZE * SIZE)
    scale = torch.ones(CHANNELS)
    found = KERNELS.run(SqueezeBackward(pooled, None, activation(dtype), Transform(torch.zeros(CHANNELS), scale, torch.zeros(CHANNELS))))[0]
    exact = torch.full((CHANNELS,), (1 + unit / 5) * N * SIZE * SIZE).double()
    assert 0.8 < kept(total(found), torch.full((CHANNELS,), float(N * SIZE * SIZE)).double(), exact) < 1.2
