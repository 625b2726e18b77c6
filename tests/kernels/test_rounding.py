"""Corrections far below the last place of a bfloat16 gradient are kept on average: kernels/rounding.py."""

from __future__ import annotations

import pytest
import torch
from needs import needs_kernels
from small_corrections import kept, total
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.kernels.calls import ConvBackward, JoinBackward, Kernels, SqueezeBackward, StatisticsBackward
from bnrestructure.kernels.cpu import KERNELS as CPU
from bnrestructure.kernels.reference import REFERENCE
from bnrestructure.kernels.rounding import GRADIENT_FACTOR, dithered

KERNELS = [
    pytest.param(CPU.convolutions.by("fused"), id="fused", marks=needs_kernels),
    pytest.param(CPU.convolutions.by("hybrid"), id="hybrid", marks=needs_kernels),
    pytest.param(REFERENCE, id="reference"),
]
SWEEPS = [pytest.param(CPU, id="cpu", marks=needs_kernels), pytest.param(REFERENCE, id="reference")]

N, CHANNELS, SIZE = 4, 24, 32


def activation(channels: int = CHANNELS) -> Tensor:
    return torch.randn(N, channels, SIZE, SIZE).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def corrections(p: Tensor, y: Tensor) -> BackwardEdge:
    """Those of a batch norm: they make the sums of dY zero. Each is a hundredth of P."""
    p = p.double() + 0.01
    mean = y.double().mean((0, 2, 3))
    b = -p.mean((0, 2, 3))
    return BackwardEdge(None, torch.zeros(p.shape[1]), b.float(), y, mean.float())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("transform", ["none", "affine"])
def test_convolution_backward(kernel: Kernels, transform: str) -> None:
    p, y, x = activation(), activation(), activation(16)
    edge = corrections(p, y)
    weight = torch.randn(CHANNELS, 16, 1, 1).to(torch.bfloat16).float()
    t = Transform() if transform == "none" else Transform(torch.zeros(16), torch.full((16,), 1.7), torch.full((16,), 90.0), "relu")
    found = kernel.run(ConvBackward(
        p, edge, x, t, weight, ConvGeometry((1, 1), (0, 0), (1, 1), 1), dtype=torch.bfloat16, needs=(True, True, False)
    ))
    matrix = weight.double().view(CHANNELS, 16) * (1.0 if t.scale is None else 1.7)
    exact = edge.b.double() * (N * SIZE * SIZE) + total(p)
    assert 0.8 < kept(total(found.dx), total(p) @ matrix, exact @ matrix) < 1.2
    z = x.double() if t.scale is None else (x.double() * 1.7 + 90).relu().to(torch.bfloat16).double()
    wanted = torch.einsum("nohw,nchw->oc", p.double() + edge.b.double().view(1, -1, 1, 1), z)
    error = (found.weight.double().view(CHANNELS, 16) - wanted).norm() / wanted.norm()
    lost = (torch.einsum("nohw,nchw->oc", p.double(), z) - wanted).norm() / wanted.norm()
    # With an input of mean 90 the weight gradient is little else than the sum of dY: what is left of it is rounding's.
    assert error < (0.01 if t.scale is None else 0.3 * lost)


@pytest.mark.parametrize("kernel", SWEEPS)
def test_depthwise_backward(kernel: Kernels) -> None:
    p, y, x = activation(), activation(), activation()
    edge = corrections(p, y)
    weight = torch.full((CHANNELS, 1, 1, 1), 1.5)
    found = kernel.run(ConvBackward(
        p, edge, x, Transform(), weight, ConvGeometry((1, 1), (0, 0), (1, 1), CHANNELS),
        dtype=torch.bfloat16, needs=(True, False, False),
    ))  # fmt: skip
    exact = total(p) + edge.b.double() * (N * SIZE * SIZE)
    assert 0.8 < kept(total(found.dx), 1.5 * total(p), 1.5 * exact) < 1.2


@pytest.mark.parametrize("kernel", SWEEPS)
def test_statistics_backward(kernel: Kernels) -> None:
    p, y = activation(), activation()
    edge = corrections(p, y)
    found = total(kernel.run(StatisticsBackward(y, edge.mean, edge.a, edge.b, p.clone())))
    assert 0.9 < kept(found, total(p), total(p) + edge.b.double() * (N * SIZE * SIZE)) < 1.1


@pytest.mark.parametrize("kernel", SWEEPS)
def test_residual_backward(kernel: Kernels) -> None:
    p, y = activation(), activation()
    edge = corrections(p, y)
    found, *_ = kernel.run(JoinBackward(p, (edge.a, edge.b, edge.mean), Join(y, Transform(), activation(), Transform(), "identity"), y))
    assert 0.9 < kept(total(found), total(p), total(p) + edge.b.double() * (N * SIZE * SIZE)) < 1.1


@pytest.mark.parametrize("kernel", SWEEPS)
def test_squeeze_backward(kernel: Kernels) -> None:
    """All pixels of an image get the same gradient: rounded alike, the whole sum would be off by up to half a unit."""
    share = torch.rand(N, CHANNELS) + 1
    identity = Transform(torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.zeros(CHANNELS))
    for into in (None, torch.zeros(N, CHANNELS, SIZE, SIZE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)):
        dx, sum_p, *_ = kernel.run(SqueezeBackward(share, None, activation(), identity, accumulate=into))
        assert dx.dtype is torch.bfloat16
        torch.testing.assert_close(total(dx), sum_p.double(), rtol=1e-4, atol=0)


@needs_kernels
def test_the_cpu_kernels_dither_as_the_reference_does() -> None:
    p, y = activation(), activation()
    edge = corrections(p, y)
    found, expected = (kernels.run(StatisticsBackward(y, edge.mean, edge.a, edge.b, p.clone())) for kernels in (CPU, REFERENCE))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_special_values_stay(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).expand(2, 3, 5)
    found = dithered(special, dtype)
    assert torch.equal(found.nan_to_num(7.0), special.to(dtype).nan_to_num(7.0))
    assert torch.equal(found.signbit()[..., :4], special.signbit()[..., :4])  # a NaN's sign means nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_value_moves_by_more_than_a_unit(dtype: torch.dtype) -> None:
    value = torch.randn(2, 8, 64) * torch.logspace(-3, 3, 64)
    limits = torch.finfo(dtype)
    unit = value.abs().clamp(min=limits.tiny) * limits.eps
    assert ((dithered(value, dtype).float() - value).abs() <= unit).all()


def test_the_factor_keeps_corrections_as_its_comment_says() -> None:
    """Of log-uniform bfloat16 mantissas and corrections up to half a unit: the worst share lost on average, in units."""

    def worst(factor: float) -> float:
        mantissa = torch.arange(128, 256, dtype=torch.float64)
        weight = (1 / mantissa) / (1 / mantissa).sum()
        found = []
        for size in torch.logspace(-3, -0.3010, 40, dtype=torch.float64).tolist():
            for correction in (size, -size):
                kept = ((factor * (mantissa + correction)).float().to(torch.bfloat16).double() / factor - mantissa) @ weight
                found.append(abs(kept.item() - correction))
        return max(found)

    assert worst(GRADIENT_FACTOR) < 0.016
    assert worst(1.0) > 0.4
