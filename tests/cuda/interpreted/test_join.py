"""A residual join inside the convolution that reads it, interpreted: the sum, and every gradient, against fp64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.cpu_checks import assert_as_good, in_layout, to_double
from test_convolution import CASES, Case, draw_edge
from torch import Tensor

from bnrestructure.core.activation import PLAIN_ACTIVATIONS
from bnrestructure.core.edges import BackwardEdge, Join, Transform
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels.calls import ConvBackward, ConvForward, JoinForward
from bnrestructure.kernels.choice import Node
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.cuda.layout import Pixels
from bnrestructure.kernels.cuda.rule import BACKWARD, forms_sum
from bnrestructure.kernels.reference import REFERENCE

POINT = ("1x1", "1x1, one channel")


def draw(case: Case, act: str, dtype: torch.dtype, *, shortcut: bool, gated: bool = False) -> tuple[Join, Tensor]:
    """The join and the weight: r is moved where the sum lies at a kink, on whose two sides the derivative differs."""
    y, r = (torch.randn(case.n, case.c, *case.size).to(dtype) for _ in range(2))
    ty, tr = (Transform(torch.randn(case.c), torch.rand(case.c) + 0.5, torch.randn(case.c)) for _ in range(2))
    tr = tr if shortcut else Transform()
    ty = ty._replace(gate=torch.rand(case.n, case.c) + 0.2) if gated else ty
    u, _, _ = REFERENCE.run(to_double(JoinForward(Join(y, ty, r, tr, "identity"), dtype)))
    near = sum((u - kink).abs() < 0.06 for kink in (0.0, 3.0, -3.0, 6.0)).bool()
    weight = torch.randn(case.out, case.c // case.groups, *case.kernel).to(dtype)
    return Join(y, ty, torch.where(near, (r + 0.4).to(dtype), r), tr, act), weight


def forward(kernels: Any, a: tuple[Join, Tensor], case: Case, dtype: torch.dtype, bias: Tensor) -> tuple[Any, ...]:
    join, weight = a
    z = kept_activation(join.y.shape, dtype, join.y.device)
    return z, *kernels.run(ConvForward(z, Transform(), weight, bias, case.geometry, dtype, True, join=join))


def backward(
    kernels: Any, p: Tensor, edge: BackwardEdge, z: Tensor, a: tuple[Join, Tensor], case: Case, dtype: torch.dtype, into: Tensor | None
) -> tuple[Any, ...]:
    into = None if into is None else into.clone(memory_format=torch.preserve_format)
    join, weight = a
    found = kernels.run(ConvBackward(p, edge, z, Transform(), weight, case.geometry, dtype, accumulate=into, join=join))
    return found.dx, found.sum_p, found.sum_px, found.sum_pr, found.weight, found.bias


def check(
    case: Case, act: str, dtype: torch.dtype, *, shortcut: bool = True, gated: bool = False, into: str | None = "channels_last",
    by: Any = KERNELS,
) -> None:  # fmt: skip
    a = draw(case, act, dtype, shortcut=shortcut, gated=gated)
    exact, bias = to_double(a), torch.randn(case.out)
    truth = forward(REFERENCE, exact, case, torch.float64, bias.double())
    assert_as_good("forward", *(forward(k, a, case, dtype, bias) for k in (by, REFERENCE)), truth)
    p, edge = draw_edge(case, dtype)
    z = truth[0].to(dtype)
    before = None if into is None else in_layout(torch.randn(case.n, case.c, *case.size).to(dtype), into)
    doubled = None if before is None else before.double()
    truth = backward(REFERENCE, p.double(), to_double(edge), z.double(), exact, case, torch.float64, doubled)
    assert_as_good("backward", *(backward(k, p, edge, z, a, case, dtype, before) for k in (by, REFERENCE)), truth)


@pytest.mark.parametrize(
    "name",
    [*POINT, "1x1, stride 2", "3x3", "3x3, stride 2", "1x1, stride 3 and padding", "3x3, groups", "1x1, groups", "depthwise 3x3"],
)
def test_shapes(name: str) -> None:
    weight = (1, 1, *CASES[name].kernel)
    node = Node((1, 1, 9, 9), weight, CASES[name].geometry, torch.float32, False, joined=True)
    assert forms_sum(node) == (name in POINT)
    for shortcut in (False, True):
        check(CASES[name], "relu", torch.float32, shortcut=shortcut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*POINT, "1x1, stride 2", "3x3", "3x3, groups", "depthwise 3x3"])
def test_a_gate(name: str, dtype: torch.dtype) -> None:
    for shortcut in (False, True):
        check(CASES[name], "relu", dtype, shortcut=shortcut, gated=True)


@pytest.mark.own_tiles
def test_a_gate_in_the_rules_own_tiles() -> None:
    check(CASES["1x1"], "silu", torch.bfloat16, gated=True)


@pytest.mark.parametrize("into", [None, "slice", "nchw"])
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_what_is_accumulated_to(name: str, into: str | None) -> None:
    check(CASES[name], "relu", torch.float32, into=into)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], "relu", dtype)


@pytest.mark.parametrize("act", [*PLAIN_ACTIVATIONS, "leaky_relu(0.1)"])
def test_every_activation(act: str) -> None:
    check(Case(5, 4, size=(6, 5), n=3), act, torch.float32)  # sums of ninety pixels: of a few, one cancels on some processor


@pytest.mark.parametrize("implementation", BACKWARD)
def test_each_implementation(implementation: str) -> None:
    """Whichever is chosen finishes the join; forward, those that cannot form the sum have it formed first."""
    name = "depthwise 3x3" if implementation == "depthwise" else "1x1"
    one_word = implementation if implementation in ("fused", "hybrid", "depthwise", "reference") else "fused"
    forward, backward = KERNELS.convolutions.by(one_word), KERNELS.convolutions.by(implementation)
    by = SimpleNamespace(run=lambda call: (forward if isinstance(call, ConvForward) else backward).run(call))
    check(CASES[name], "relu", torch.float32, by=by)
    check(CASES[name], "relu", torch.float32, gated=True, by=by)


@pytest.mark.own_tiles
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_the_rules_own_tiles(name: str) -> None:
    check(CASES[name], "relu", torch.bfloat16)


@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_64_bit_offsets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of more than 2^31 elements do not fit here, so small ones are treated as such."""
    monkeypatch.setattr(Pixels, "wide", property(lambda self: True))
    check(CASES[name], "relu", torch.float32)


def test_layouts() -> None:
    """y, r and P of any strides."""
    case = CASES["1x1"]
    a = draw(case, "relu", torch.float32, shortcut=True)
    p, edge = draw_edge(case, torch.float32)
    expected, bias = forward(KERNELS, a, case, torch.float32, torch.zeros(case.out)), torch.zeros(case.out)
    gradients = backward(KERNELS, p, edge, expected[0], a, case, torch.float32, None)
    for layout in ("slice", "nchw"):
        moved = replace(a[0], y=in_layout(a[0].y, layout), r=in_layout(a[0].r, layout)), a[1]
        for found, value in zip(forward(KERNELS, moved, case, torch.float32, bias), expected, strict=True):
            assert torch.equal(found, value)
        found = backward(KERNELS, in_layout(p, layout), edge, in_layout(expected[0], layout), moved, case, torch.float32, None)
        for one, value in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, value)


def test_in_place_where_it_can() -> None:
    case = CASES["3x3"]
    a = draw(case, "relu", torch.float32, shortcut=False)
    p, edge = draw_edge(case, torch.float32)
    z = forward(REFERENCE, a, case, torch.float32, torch.zeros(case.out))[0].contiguous(memory_format=torch.channels_last)
    into = torch.zeros_like(z)
    call = ConvBackward(p, edge, z, Transform(), a[1], case.geometry, torch.float32, accumulate=into, join=a[0])
    g = KERNELS.convolutions.by("fused").run(call).dx
    assert g is into
