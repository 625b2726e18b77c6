"""Sums over pixels of gradients whose signs agree: as near to the truth as PyTorch's pairwise sums.

Where a batch norm behind takes a bias away its gradient is zero, and what is left of the sum is its rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_checks import to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.kernels.calls import ConvBackward, JoinForward
from bnrestructure.kernels.cpu import KERNELS
from bnrestructure.kernels.reference import REFERENCE

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]

CHANNELS, SIZE = 64, 14
FUSED, HYBRID = KERNELS.convolutions.by("fused"), KERNELS.convolutions.by("hybrid")
#: (kernels, dy, x, r, weight, its transform, in this dtype) -> SP
Sum = Callable[..., Tensor]


def geometry_of(weight: Tensor) -> ConvGeometry:
    return ConvGeometry((1, 1), (weight.shape[2] // 2,) * 2, (1, 1), 1)


def of_a_convolution(kernels, dy: Tensor, x: Tensor, r: Tensor, weight: Tensor, transform: Transform) -> Tensor:
    arguments = dy, BackwardEdge(), x, transform, weight, geometry_of(weight)
    return kernels.run(ConvBackward(*arguments, dy.dtype, (True, False, False))).sum_p


def of_a_bias(kernels, dy: Tensor, x: Tensor, r: Tensor, weight: Tensor, transform: Transform) -> Tensor:
    arguments = dy, BackwardEdge(), x, transform, weight, geometry_of(weight)
    return kernels.run(ConvBackward(*arguments, dy.dtype, (False, False, True))).bias


def of_a_join(kernels, dy: Tensor, x: Tensor, r: Tensor, weight: Tensor, transform: Transform) -> Tensor:
    join = Join(x, transform, r, Transform(), "identity")
    z, _, _ = REFERENCE.run(JoinForward(join, dy.dtype))
    arguments = dy, BackwardEdge(), z, Transform(), weight, geometry_of(weight)
    return kernels.run(ConvBackward(*arguments, dy.dtype, (True, False, False), join=join)).sum_p


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("kernels", "sum_of"),
    [
        (FUSED, of_a_convolution), (HYBRID, of_a_convolution), (FUSED, of_a_bias), (HYBRID, of_a_bias), (KERNELS, of_a_join),
    ],
    ids=["fused", "hybrid", "fused bias", "hybrid bias", "join"],
)  # fmt: skip
def test_as_exact_as_pytorchs(kernels, sum_of: Sum, size: int) -> None:
    ours, theirs = [], []
    for _ in range(4):
        x, r, dy = (torch.randn(2, CHANNELS, SIZE, SIZE).contiguous(memory_format=torch.channels_last) for _ in range(3))
        weight = torch.randn(CHANNELS, CHANNELS, size, size) / (CHANNELS**0.5 * size)
        transform = Transform(torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS))
        arguments = dy + 1, x, r, weight, transform
        truth = sum_of(REFERENCE, *to_double(arguments))
        for errors, of in ((ours, kernels), (theirs, REFERENCE)):
            errors.append((sum_of(of, *arguments).double() - truth) / truth.abs().mean())
    assert torch.stack(ours).square().mean().sqrt() < 2 * torch.stack(theirs).square().mean().sqrt()
