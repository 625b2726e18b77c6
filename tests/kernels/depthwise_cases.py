"""Depthwise convolutions to test kernels on, and what their results are held against.

The rule: the distance to the float64 result is at most twice that of the reference kernel in the same dtype, plus a few
units in the last place (a reference error may happen to be zero).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Transform
from bnrestructure.kernels.calls import ConvBackward, ConvForward, StatisticsForward
from bnrestructure.kernels.cpu import KERNELS
from bnrestructure.kernels.reference import REFERENCE

DEPTHWISE = KERNELS.convolutions.by("depthwise")

FACTOR = 2.0
ULPS = 4.0

GRADIENTS = ("dx", "sum_p", "sum_px", "gate", "weight", "bias")


@dataclass(frozen=True)
class Shape:
    """A depthwise convolution; kernel, stride, padding and dilation are (height, width)."""

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(self.stride, self.padding, self.dilation, self.channels)

    @property
    def output(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, *self.geometry.output_size(self.size, self.kernel))


@dataclass(frozen=True)
class Case:
    """All arguments of both kernels."""

    x: Tensor
    transform: Transform
    weight: Tensor
    bias: Tensor | None
    geometry: ConvGeometry
    dy: Tensor
    edge: BackwardEdge
    dtype: torch.dtype

    def forward(self, kernels, **options):
        return kernels.run(ConvForward(
            self.x, self.transform, self.weight, self.bias, self.geometry,
            dtype=self.dtype, **{"statistics": True, **options},
        ))  # fmt: skip

    def backward(self, kernels, **options):
        return kernels.run(ConvBackward(
            self.dy, self.edge, self.x, self.transform, self.weight, self.geometry,
            dtype=self.dtype, **{"needs": (True, True, self.bias is not None), **options},
        ))  # fmt: skip

    def double(self) -> Case:
        """The same numbers in float64."""
        return replace(
            self,
            x=self.x.double(),
            transform=_double(self.transform),
            weight=self.weight.double(),
            bias=None if self.bias is None else self.bias.double(),
            dy=self.dy.double(),
            edge=_double(self.edge),
            dtype=torch.float64,
        )


def _double(edge):
    names = edge._fields if isinstance(edge, tuple) else edge.__dataclass_fields__
    values = {name: getattr(edge, name) for name in names}
    return type(edge)(**{name: v.double() if isinstance(v, Tensor) else v for name, v in values.items()})


def make(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    act: str = "relu6",
    *,
    affine: bool = True,
    gate: bool = False,
    edge: str = "full",
    bias: bool = True,
    x_mean: float = 0.3,
    seed: int = 0,
) -> Case:
    """A random case. ``edge``: "full", "scale" (no statistics) or "none"."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    c = shape.channels
    x = (normal(shape.batch, c, *shape.size) + x_mean).to(dtype).contiguous(memory_format=torch.channels_last)
    mean = x.float().mean((0, 2, 3))
    transform = Transform(act=act)
    if affine:
        transform = Transform(mean, 0.5 + normal(c).abs(), normal(c), act)
    if gate:
        transform = transform._replace(gate=torch.sigmoid(normal(shape.batch, c)))
    weight = normal(c, 1, *shape.kernel).to(dtype)
    dy, y = (
        normal(*shape.output).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )  # fmt: skip
    backward = BackwardEdge()
    if edge != "none":
        backward = BackwardEdge(s=normal(c))
    if edge == "full":
        backward = BackwardEdge(normal(c), 0.1 * normal(c), 0.1 * normal(c), y, y.float().mean((0, 2, 3)))
    b = normal(c).to(dtype) if bias else None
    return Case(x, transform, weight, b, shape.geometry, dy, backward, dtype)


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative distance in the 2-norm; NaN where anything is NaN."""
    scale = truth.double().norm()
    return float((value.double() - truth.double()).norm() / (scale if scale > 0 else 1.0))


def check(name: str, value: Tensor | None, expected: Tensor | None, truth: Tensor | None) -> None:
    """Fails unless ``value`` is as near to ``truth`` as the reference kernel's ``expected`` is."""
    assert (value is None) == (expected is None) == (truth is None), name
    if value is None:
        return
    assert value.shape == expected.shape, name
    assert value.dtype == expected.dtype, name
    allowed = FACTOR * distance(expected, truth) + ULPS * torch.finfo(value.dtype).eps
    assert distance(value, truth) <= allowed, name


def check_forward(case: Case, **options) -> None:
    y, mean, var = case.forward(DEPTHWISE, **options)
    expected = case.forward(REFERENCE)[0]
    check("y", y, expected, case.double().forward(REFERENCE)[0])
    # Of y as stored: nothing but the sums' own rounding is left.
    true_mean, true_var = REFERENCE.run(StatisticsForward(y.double()))
    deviation = true_var.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    assert ((mean - true_mean).abs() <= 1e-6 * deviation + 1.2e-7 * true_mean.abs()).all()
    assert ((var - true_var).abs() <= 2e-6 * true_var + torch.finfo(torch.float32).tiny).all()


def check_backward(case: Case, **options) -> None:
    value = case.backward(DEPTHWISE, **options)
    expected = case.backward(REFERENCE, **options)
    truth = case.double().backward(REFERENCE, **options)
    for name in GRADIENTS:
        check(name, getattr(value, name), getattr(expected, name), getattr(truth, name))
