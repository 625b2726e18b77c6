"""The CPU kernels' index arithmetic, over all small geometries: on small integers, whose sums float32 holds exactly, results are equal.

Nothing is rounded, so that a single element read from, written to or summed at a wrong place shows. The transform maps zeros to something
else: padding that it was applied to would show, too. Folded kernels (1-D and 3-D data as images) are run around the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Transform
from bnrestructure.kernels import cpu
from bnrestructure.kernels.calls import ConvBackward, ConvForward
from bnrestructure.kernels.folded import FoldedKernels
from bnrestructure.kernels.reference import REFERENCE, ReferenceKernels

Pair = tuple[int, int]

SIZES = ((1, 1), (2, 3), (5, 4), (7, 9))
KERNELS = ((1, 1), (1, 3), (2, 2), (3, 3), (5, 3))
STRIDES = ((1, 1), (2, 1), (2, 2), (3, 2))
PADDINGS = ((0, 0), (1, 0), (1, 1), (2, 3))
DILATIONS = ((1, 1), (2, 1), (2, 3))


def geometries(groups: int, kernels: tuple[Pair, ...] = KERNELS) -> Iterator[tuple[Pair, Pair, ConvGeometry]]:
    """(size of the input, kernel, geometry) of every convolution of these that has an output, and a dilation only where it has a meaning.

    PyTorch 2.14's own convolution (oneDNN 3.12, channels_last) dies of a dilated 1x1 kernel with a stride and padding over a single pixel.
    """
    for size, kernel, stride, padding, dilation in product(SIZES, kernels, STRIDES, PADDINGS, DILATIONS):
        geometry = ConvGeometry(stride, padding, dilation, groups)
        if any(k == 1 and d > 1 for k, d in zip(kernel, dilation, strict=True)):
            continue
        if min(geometry.output_size(size, kernel)) >= 1:
            yield size, kernel, geometry


def integers(generator: torch.Generator, *shape: int) -> Tensor:
    """From -3 to 3, channels_last."""
    made = torch.randint(-3, 4, shape, generator=generator).float()
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


def transform_of(channels: int) -> Transform:
    """Whole numbers; of 0 it makes 5 in even channels and 0 in odd ones."""
    even = torch.arange(channels) % 2 == 0
    return Transform(torch.where(even, -1.0, 2.0), torch.full((channels,), 2.0), torch.full((channels,), 3.0), "relu")


def assert_same(kernels: Any, x: Tensor, weight: Tensor, geometry: ConvGeometry, generator: torch.Generator) -> None:
    """Forward, both gradients, the sums, the bias's gradient and the accumulation, exactly."""
    transform, bias = transform_of(x.shape[1]), integers(generator, weight.shape[0])
    forward = ConvForward(x, transform, weight, bias, geometry, torch.float32)
    y = REFERENCE.run(forward).y
    assert torch.equal(kernels.run(forward).y, y), "forward"
    dy, before = integers(generator, *y.shape), integers(generator, *x.shape)
    edge = BackwardEdge(s=integers(generator, y.shape[1]))
    backward = ConvBackward(dy, edge, x, transform, weight, geometry, torch.float32)
    expected, gradients = (k.run(replace(backward, accumulate=before.clone())) for k in (REFERENCE, kernels))
    for name, one, other in zip(expected._fields, expected, gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other), name


@needs_kernels
@pytest.mark.parametrize(
    ("implementation", "groups"), [("fused", 1), ("fused", 3), ("hybrid", 1)], ids=["fused", "groups", "hybrid"]
)
def test_dense_convolutions(implementation: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for size, kernel, geometry in geometries(groups):
        x, weight = integers(generator, 2, 6, *size), integers(generator, 9, 6 // groups, *kernel)
        try:
            assert_same(cpu.KERNELS.convolutions.by(implementation), x, weight, geometry, generator)
        except AssertionError as error:
            raise AssertionError(f"{error} of {size}, {kernel}, {geometry}") from None


@needs_kernels
def test_depthwise_convolutions() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, kernel, geometry in geometries(17, (*KERNELS, (7, 7))):
        x, weight = integers(generator, 2, 17, *size), integers(generator, 17, 1, *kernel)
        try:
            assert_same(cpu.KERNELS.convolutions.by("depthwise"), x, weight, geometry, generator)
        except AssertionError as error:
            raise AssertionError(f"{error} of {size}, {kernel}, {geometry}") from None


@needs_kernels
@pytest.mark.parametrize("channels", [(8, 8), (17, 9)], ids=str)
def test_winograd(channels: tuple[int, int]) -> None:
    """F(2x2, 3x3) wherever it may run, padded and not: tiles that hang over every edge. Halves and quarters are exact, too."""
    generator = torch.Generator().manual_seed(0)
    for h, w, padding in product(range(4, 9), range(4, 9), product(range(3), range(3))):
        geometry = ConvGeometry((1, 1), padding, (1, 1), 1)
        if min(geometry.output_size((h, w), (3, 3))) >= 4:
            x, weight = integers(generator, 2, channels[0], h, w), integers(generator, channels[1], channels[0], 3, 3)
            try:
                assert_same(cpu.KERNELS.convolutions.by("winograd"), x, weight, geometry, generator)
            except AssertionError as error:
                raise AssertionError(f"{error} of {h} x {w}, {geometry}") from None


#: 1-D kernels, and those of 3-D data: over frames, over time with rows that are whole frames, with a stride in time.
FOLDED = [
    ((4,), (3,), (2,), (1,), (1,)), ((5,), (2,), (1,), (0,), (2,)), ((1,), (1,), (1,), (0,), (1,)), ((7,), (3,), (3,), (2,), (1,)),
    *(((t, 3, 4), (1, 3, 2), (s, 2, 1), (0, 1, 1), (1, 1, 2)) for t in (1, 2, 5) for s in (1, 2, 3)),
    *(((t, 2, 3), (k, 1, 1), (s, 1, 1), (p, 0, 0), (d, 1, 1)) for t, k, s, p, d in product((1, 2, 5), (1, 2, 3), (1, 2), (0, 1), (1, 2))),
]  # fmt: skip


class _Images(ReferenceKernels):
    """The reference as a device's kernels, for 4-D tensors only."""

    def run(self, call: Any) -> Any:
        assert call.operand.dim() == 4
        return super().run(call)


@pytest.mark.parametrize("groups", [1, 2])
def test_folded_convolutions(groups: int) -> None:
    """A convolution of 1-D or 3-D data is the 2-D one of its folded views."""
    generator = torch.Generator().manual_seed(0)
    kernels = FoldedKernels(_Images())  # type: ignore[arg-type]
    for size, kernel, *geometry in FOLDED:
        made = ConvGeometry(*geometry, groups)  # type: ignore[arg-type, misc]
        if min(made.output_size(size, kernel)) < 1:
            continue
        x, weight = integers(generator, 2, 4, *size), integers(generator, 6, 4 // groups, *kernel)
        try:
            assert_same(kernels, x, weight, made, generator)
        except AssertionError as error:
            raise AssertionError(f"{error} of {size}, {kernel}, {made}") from None
