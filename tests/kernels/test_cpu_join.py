"""A residual join inside the convolution that reads it, on the CPU: every implementation against the reference kernel in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from cpu_checks import KINKS, LAYOUTS, assert_as_good, in_layout, to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.kernels import cpu, reference
from bnrestructure.kernels.cpu import convolution, library
from bnrestructure.kernels.cpu.convolution_choice import candidates

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

    def forward(self, kernels, out: Tensor | None = None):
        args = (self.join, self.weight, self.bias, self.geometry)
        return kernels.join_forward(*args, dtype=self.dy.dtype, statistics=True, out=out)

    def backward(self, kernels, z: Tensor, needs: tuple[bool, bool] = (True, True)):
        into = None if self.into is None else self.into.clone(memory_format=torch.preserve_format)
        args = (self.dy, self.edge, z, self.join, self.weight, self.geometry)
        return kernels.join_backward(*args, dtype=self.dy.dtype, needs=needs, accumulate=into)

    def double(self) -> Case:
        into = None if self.into is None else self.into.double()
        join = Join(*to_double(self.join.operands))
        return Case(self.dy.double(), to_double(self.edge), join, self.weight.double(), self.bias.double(), self.geometry, into)


def vectors(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(channels) * 0.3 + 0.5, torch.rand(channels) + 0.5, torch.randn(channels) * 0.3


def away_from_kinks(y: Tensor, ty: Transform, r: Tensor, tr: Transform, act: str) -> Tensor:
    """r, moved where the sum lies so near a kink of the activation that its own rounding decides on which side."""
    exact = y.double(), to_double(ty), r.double(), to_double(tr)
    u, _, _ = reference.residual_forward(*exact, "identity", dtype=torch.float64, statistics=False)
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
    edge: bool = True,
    into: str | None = None,
    layout: str = "channels_last",
) -> Case:
    """Random arguments. The shortcut has a batch norm of its own or not; ``into``: the layout of what is accumulated to."""
    n, c, out, size, k, stride, padding, groups = SHAPES[name]
    geometry = ConvGeometry((stride,) * 2, (padding,) * 2, (1, 1), groups)
    size_out = geometry.output_size(size, (k, k))
    weight = torch.randn(out, c // groups, k, k)
    y, r = (in_layout(torch.randn(n, c, *size).to(dtype), layout) for _ in range(2))
    dy, result = (in_layout(torch.randn(n, out, *size_out).to(dtype), "channels_last") for _ in range(2))
    ty, tr = Transform(*vectors(c)), Transform(*vectors(c)) if shortcut else Transform()
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
    z, *_ = case.forward(reference)
    assert_as_good(f"{name}: forward", case.forward(cpu), case.forward(reference), truth.forward(reference))
    expected, exact = case.backward(reference, z), truth.backward(reference, z.double())
    compare(f"{name}: backward", case.backward(cpu, z), expected, exact)


def compare(name: str, found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...], exact: tuple[Tensor | None, ...]) -> None:
    """The limits of the convolution's own tests: twice as wide for sums over pixels."""
    for part, *values in zip(("G", "SP", "SPY", "SPR", "weight", "bias"), found, expected, exact, strict=True):
        assert_as_good(f"{name}: {part}", *values, factor=4.0 if part in ("G", "weight") else 8.0)


@pytest.mark.parametrize("isa", library.available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: torch.dtype, isa: str) -> None:
    with library.use(isa):
        for shortcut in (False, True):
            for into in (None, "channels_last", "slice", "nchw"):
                check(f"{shortcut=}, {into=}", make_case(name, dtype, "relu", shortcut=shortcut, into=into))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu(0.2)"])
def test_activations(act: str, dtype: torch.dtype) -> None:
    for name in ("1x1 odd", "3x3"):
        check(act, make_case(name, dtype, act, shortcut=True, into="channels_last"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    check(layout, make_case("1x1 odd", dtype, "relu", shortcut=True, edge=False, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape[-1] != shape[1]])
def test_each_implementation(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the choice falls on, the join is finished in the dgrad's epilogue of that implementation."""
    case = make_case(name, dtype, "relu", shortcut=True, into="channels_last")
    z, *_ = case.forward(reference)
    node = convolution.node_of(tuple(z.shape), tuple(case.weight.shape), case.geometry, False)
    expected, exact = case.backward(reference, z), case.double().backward(reference, z.double())
    finished: list[str] = []
    for implementation in candidates(node, dtype, "backward"):

        def run(_: str, *args: object, chosen: str = implementation, original=convolution.run_backward, **options: object) -> ConvGradients:
            finished.append(chosen)
            return original(chosen, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(convolution, "run_backward", run)
            compare(implementation, case.backward(cpu, z), expected, exact)
    assert finished == list(candidates(node, dtype, "backward"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1x1 odd", "3x3 odd"])
def test_written_into_a_buffer(name: str, layout: str) -> None:
    case = make_case(name, torch.float32, "relu", shortcut=True)
    expected = case.forward(cpu)
    out = in_layout(torch.full_like(expected[1], torch.nan), layout)
    found = case.forward(cpu, out)
    assert found[1] is out
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_needs() -> None:
    case = make_case("3x3", torch.float32, "relu", shortcut=False, into="channels_last")
    z, *_ = case.forward(cpu)
    whole = case.backward(cpu, z)
    for needs in ((True, False), (False, True), (False, False)):
        found = case.backward(cpu, z, needs)
        for one, all_of_it in zip(found[:4], whole[:4], strict=True):
            assert (one is None and all_of_it is None) or torch.allclose(one, all_of_it, rtol=1e-4, atol=1e-4)
        assert tuple(x is not None for x in found[4:]) == needs


def test_in_place_where_it_can() -> None:
    """The other readers' gradient is finished where it lies; nothing is copied, and the join is passed no second tensor."""
    case = make_case("1x1", torch.float32, "relu", shortcut=True)
    z, *_ = case.forward(cpu)
    into = torch.zeros_like(z)
    g = cpu.join_backward(
        case.dy, case.edge, z, case.join, case.weight, case.geometry,
        dtype=torch.float32, needs=(True, True), accumulate=into,
    )[0]  # fmt: skip
    assert g is into
    assert torch.equal(g, case.backward(cpu, z)[0])


def test_supports_gives_reasons() -> None:
    case = make_case("1x1", torch.float32, "relu", shortcut=False)
    join, rest = case.join, (case.weight, case.bias, case.geometry)
    options = {"dtype": torch.float32, "statistics": True}
    assert cpu.supports("join_forward", (join, *rest), options) is None
    wrong = {
        "softplus": replace(join, act="softplus"),
        "one dtype": replace(join, r=join.r.bfloat16()),
        "float64": replace(join, y=join.y.double(), r=join.r.double()),
    }
    for words, of in wrong.items():
        assert words in str(cpu.supports("join_forward", (of, *rest), options)), words
