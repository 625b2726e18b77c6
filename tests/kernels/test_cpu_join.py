"""A residual join inside the convolution that reads it, on the CPU: every implementation against the reference kernel in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from cpu_checks import KINKS, LAYOUTS, assert_as_good, in_layout, to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels import join
from bnrestructure.kernels.calls import ConvBackward, ConvForward, JoinForward, Kernels
from bnrestructure.kernels.choice import Node, OneOf
from bnrestructure.kernels.cpu import KERNELS as CPU
from bnrestructure.kernels.cpu import library
from bnrestructure.kernels.reference import REFERENCE

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = (torch.float32, torch.bfloat16)
#: (batch, channels, outputs, size, kernel, stride, padding, groups)
SHAPES = {
    "1x1": (2, 32, 70, (8, 8), 1, 1, 0, 1),
    "1x1 odd": (3, 17, 35, (7, 5), 1, 1, 0, 1),
    "1x1 more channels than a block": (2, 600, 40, (4, 4), 1, 1, 0, 1),
    "1x1 stride 2": (2, 16, 24, (10, 9), 1, 2, 0, 1),
    "3x3": (2, 64, 32, (14, 14), 3, 1, 1, 1),
    "3x3 odd": (3, 19, 37, (9, 7), 3, 1, 1, 1),
    "3x3 stride 2": (2, 24, 40, (11, 13), 3, 2, 1, 1),
    "3x3 stride 4, unread rows and columns": (2, 20, 16, (10, 9), 3, 4, 0, 1),
    "1x1 groups": (2, 48, 24, (7, 7), 1, 1, 0, 3),
    "1x1 many tiles": (3, 24, 40, (90, 61), 1, 1, 0, 1),
    "3x3 groups": (2, 40, 40, (6, 6), 3, 1, 1, 2),
    "3x3 depthwise": (2, 40, 40, (9, 8), 3, 1, 1, 40),
    "5x5 on one pixel": (2, 18, 17, (1, 1), 5, 1, 2, 1),
}


@dataclass
class Case:
    dy: Tensor
    edge: BackwardEdge
    join: Join
    weight: Tensor
    bias: Tensor
    geometry: ConvGeometry
    into: Tensor | None

    def forward(self, kernels: Kernels | OneOf, out: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """(z, y, mean, var)."""
        z = kept_activation(self.join.y.shape, self.dy.dtype, self.dy.device)
        return z, *kernels.run(ConvForward(z, Transform(), self.weight, self.bias, self.geometry, self.dy.dtype, True, out, self.join))

    def backward(self, kernels: Kernels | OneOf, z: Tensor, needs: tuple[bool, bool] = (True, True)) -> tuple[Tensor | None, ...]:
        """(G, SP, SPY, SPR, weight, bias)."""
        into = None if self.into is None else self.into.clone(memory_format=torch.preserve_format)
        of = self.weight, self.geometry, self.dy.dtype
        found = kernels.run(ConvBackward(self.dy, self.edge, z, Transform(), *of, (True, *needs), into, self.join))
        return found.dx, found.sum_p, found.sum_px, found.sum_pr, found.weight, found.bias

    def double(self) -> Case:
        into = None if self.into is None else self.into.double()
        join, edge = to_double(self.join), to_double(self.edge)
        return Case(self.dy.double(), edge, join, self.weight.double(), self.bias.double(), self.geometry, into)


def vectors(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(channels) * 0.3 + 0.5, torch.rand(channels) + 0.5, torch.randn(channels) * 0.3


def away_from_kinks(y: Tensor, ty: Transform, r: Tensor, tr: Transform, act: str) -> Tensor:
    """r, moved where the sum lies so near a kink of the activation that its own rounding decides on which side."""
    u, _, _ = REFERENCE.run(to_double(JoinForward(Join(y, ty, r, tr, "identity"), torch.float64)))
    near = torch.zeros_like(u, dtype=torch.bool)
    for kink in KINKS.get(act, ()):
        near |= (u - kink).abs() < 0.06
    return torch.where(near, (r + 0.5).to(r.dtype), r)


def make_case(
    name: str,
    dtype: torch.dtype,
    act: str,
    *,
    shortcut: bool,
    gated: bool = False,
    edge: bool = True,
    into: str | None = None,
    layout: str = "channels_last",
) -> Case:
    """Random arguments. The shortcut has a batch norm of its own or not, the other operand a gate; ``into``: the layout of what is
    accumulated to.
    """
    n, c, out, size, k, stride, padding, groups = SHAPES[name]
    geometry = ConvGeometry((stride,) * 2, (padding,) * 2, (1, 1), groups)
    size_out = geometry.output_size(size, (k, k))
    weight = torch.randn(out, c // groups, k, k)
    y, r = (in_layout(torch.randn(n, c, *size).to(dtype), layout) for _ in range(2))
    dy, result = (in_layout(torch.randn(n, out, *size_out).to(dtype), "channels_last") for _ in range(2))
    ty = Transform(*vectors(c), gate=torch.rand(n, c) + 0.2 if gated else None)
    tr = Transform(*vectors(c)) if shortcut else Transform()
    r = in_layout(away_from_kinks(y, ty, r, tr, act), layout)
    a, b, mean, s = torch.randn(4, out).unbind()
    return Case(
        dy, BackwardEdge(s, a, b, result, mean) if edge else BackwardEdge(), Join(y, ty, r, tr, act),
        weight / weight[0].numel() ** 0.5, torch.randn(out), geometry,
        None if into is None else in_layout(torch.randn(n, c, *size).to(dtype), into),
    )  # fmt: skip


def check(name: str, case: Case) -> None:
    """Both directions against fp64, judged by the reference's own error in the case's dtype."""
    truth = case.double()
    z, *_ = case.forward(REFERENCE)
    assert_as_good(f"{name}: forward", case.forward(CPU), case.forward(REFERENCE), truth.forward(REFERENCE))
    expected, exact = case.backward(REFERENCE, z), truth.backward(REFERENCE, z.double())
    compare(f"{name}: backward", case.backward(CPU, z), expected, exact)


def compare(name: str, found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...], exact: tuple[Tensor | None, ...]) -> None:
    """The limits of the convolution's own tests: twice as wide for sums over pixels."""
    for part, *values in zip(("G", "SP", "SPY", "SPR", "weight", "bias"), found, expected, exact, strict=True):
        assert_as_good(f"{name}: {part}", *values, factor=4.0 if part in ("G", "weight") else 8.0)


@pytest.mark.parametrize("isa", library.available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, gated: bool, dtype: torch.dtype, isa: str) -> None:
    """Of a gate, one factor a channel of each image, tiles of several images have several."""
    with library.use(isa):
        for shortcut in (False, True):
            for into in ("channels_last",) if gated else (None, "channels_last", "slice", "nchw"):
                case = make_case(name, dtype, "relu", shortcut=shortcut, gated=gated, into=into)
                check(f"{shortcut=}, {into=}", case)
                sum_py = case.backward(CPU, case.forward(CPU)[0])[2]
                assert (sum_py is None) is gated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu(0.2)"])
def test_activations(act: str, dtype: torch.dtype) -> None:
    for name in ("1x1 odd", "3x3"):
        check(act, make_case(name, dtype, act, shortcut=True, into="channels_last"))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, gated: bool) -> None:
    check(layout, make_case("1x1 odd", dtype, "relu", shortcut=True, gated=gated, edge=False, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape[-1] != shape[1]])
def test_each_implementation(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the choice falls on, the join is finished in the dgrad's epilogue of that implementation."""
    case = make_case(name, dtype, "relu", shortcut=True, into="channels_last")
    z, *_ = case.forward(REFERENCE)
    expected, exact = case.backward(REFERENCE, z), case.double().backward(REFERENCE, z.double())
    alone: list[object] = []
    monkeypatch.setattr(join, "backward_in_turn", lambda *args: alone.append(args))
    node = Node(tuple(z.shape), tuple(case.weight.shape), case.geometry, dtype, False, joined=True)
    for implementation in CPU.convolutions.rule.candidates(node, "backward"):
        compare(implementation, case.backward(CPU.convolutions.by(implementation), z), expected, exact)
    assert not alone


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1x1 odd", "3x3 odd"])
def test_written_into_a_buffer(name: str, layout: str) -> None:
    case = make_case(name, torch.float32, "relu", shortcut=True)
    expected = case.forward(CPU)
    out = in_layout(torch.full_like(expected[1], torch.nan), layout)
    found = case.forward(CPU, out)
    assert found[1] is out
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_needs() -> None:
    case = make_case("3x3", torch.float32, "relu", shortcut=False, into="channels_last")
    z, *_ = case.forward(CPU)
    whole = case.backward(CPU, z)
    for needs in ((True, False), (False, True), (False, False)):
        found = case.backward(CPU, z, needs)
        for one, all_of_it in zip(found[:4], whole[:4], strict=True):
            assert (one is None and all_of_it is None) or torch.allclose(one, all_of_it, rtol=1e-4, atol=1e-4)
        assert tuple(x is not None for x in found[4:]) == needs


def test_in_place_where_it_can() -> None:
    """The other readers' gradient is finished where it lies; nothing is copied, and the join is passed no second tensor."""
    case = make_case("1x1", torch.float32, "relu", shortcut=True)
    z, *_ = case.forward(CPU)
    into = torch.zeros_like(z)
    call = ConvBackward(case.dy, case.edge, z, Transform(), case.weight, case.geometry, torch.float32, accumulate=into, join=case.join)
    g = CPU.run(call).dx
    assert g is into
    assert torch.equal(g, case.backward(CPU, z)[0])


def test_supports_gives_reasons() -> None:
    case = make_case("1x1", torch.float32, "relu", shortcut=False)
    of = case.join
    call = ConvForward(torch.empty_like(of.y), Transform(), case.weight, case.bias, case.geometry, torch.float32, True, join=of)
    assert CPU.supports(call) is None
    wrong = {
        "softplus": replace(of, act="softplus"),
        "one dtype": replace(of, r=of.r.bfloat16()),
    }
    for words, joined in wrong.items():
        assert words in str(CPU.supports(replace(call, join=joined))), words
    assert "float64" in str(CPU.supports(to_double(call)))
