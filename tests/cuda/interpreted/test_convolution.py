"""The fused convolution, interpreted: forward and every gradient against fp64, beside the reference's own errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernels.cpu_checks import LAYOUTS, assert_as_good, in_layout, to_double
from torch import Tensor

from bnrestructure.core.activation import PLAIN_ACTIVATIONS
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Transform
from bnrestructure.kernels.calls import ConvBackward, ConvForward
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.cuda.layout import Pixels
from bnrestructure.kernels.reference import REFERENCE


class _Fused:
    """The dense or the depthwise kernels."""

    def run(self, call: Any) -> Any:
        return KERNELS.convolutions.by("depthwise" if call.geometry.is_depthwise(call.weight.shape) else "fused").run(call)


FUSED = _Fused()
ACTIVATIONS = (*PLAIN_ACTIVATIONS, "leaky_relu(0.1)")


@dataclass(frozen=True)
class Case:
    """A convolution: [n, c, *size] by [out, c / groups, *kernel]."""

    c: int
    out: int
    kernel: tuple[int, int] = (1, 1)
    n: int = 2
    size: tuple[int, int] = (4, 5)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(self.stride, self.padding, self.dilation, self.groups)

    @property
    def output(self) -> tuple[int, ...]:
        return (self.n, self.out, *self.geometry.output_size(self.size, self.kernel))


CASES = {
    "1x1": Case(19, 21),
    "1x1, channels in eights": Case(24, 40),
    "1x1, channels in fours": Case(20, 12),
    "3x3, groups of eight": Case(24, 24, (3, 3), size=(4, 5), padding=(1, 1), groups=3),
    "3x3, groups of four, stride 2": Case(12, 8, (3, 3), size=(5, 5), padding=(1, 1), stride=(2, 2), groups=2),
    "depthwise 3x3, channels in eights": Case(24, 24, (3, 3), padding=(1, 1), groups=24),
    "1x1, one channel": Case(1, 1, n=1, size=(1, 2)),
    "1x1, stride 2": Case(18, 5, size=(7, 6), stride=(2, 2)),
    "1x1, stride 3 and padding": Case(4, 5, size=(7, 8), stride=(3, 3), padding=(1, 2)),
    "3x3": Case(17, 6, (3, 3), size=(4, 5), padding=(1, 1)),
    "3x3, few channels": Case(3, 18, (3, 3), size=(6, 5), padding=(1, 1)),
    "3x3, stride 2": Case(18, 4, (3, 3), size=(7, 6), stride=(2, 2), padding=(1, 1)),
    "3x3, no padding": Case(16, 5, (3, 3), n=1, size=(5, 6)),
    "3x3, dilation 2": Case(5, 6, (3, 3), size=(6, 5), padding=(2, 2), dilation=(2, 2)),
    "3x3, stride 2 and dilation 2": Case(
        16, 3, (3, 3), n=1, size=(7, 8), padding=(2, 2), stride=(2, 2), dilation=(2, 2)
    ),
    "3x3, groups": Case(6, 8, (3, 3), size=(4, 5), padding=(1, 1), groups=2),
    "1x1, groups": Case(36, 34, groups=2, size=(3, 3)),
    "channel multiplier": Case(4, 8, (3, 3), size=(4, 4), padding=(1, 1), groups=4),
    "5x1": Case(16, 3, (5, 1), size=(6, 3), padding=(2, 0)),
    "7x7, stride 2": Case(3, 7, (7, 7), n=1, size=(11, 9), stride=(2, 2), padding=(3, 3)),
    "uneven strides": Case(5, 4, (3, 2), size=(7, 6), stride=(1, 3), padding=(0, 1), dilation=(2, 1)),
    "depthwise 3x3": Case(6, 6, (3, 3), padding=(1, 1), groups=6),
    "depthwise 3x3, stride 2": Case(5, 5, (3, 3), size=(6, 7), stride=(2, 2), padding=(1, 1), groups=5),
    "depthwise 5x5, dilation": Case(3, 3, (5, 5), n=1, size=(6, 5), padding=(4, 4), dilation=(2, 2), groups=3),
    "depthwise 7x7": Case(3, 3, (7, 7), n=1, size=(4, 5), padding=(3, 3), groups=3),
    "depthwise 7x7, stride 2": Case(3, 3, (7, 7), n=1, size=(7, 6), stride=(2, 2), padding=(3, 3), groups=3),
    "depthwise 5x5, stride 2": Case(3, 3, (5, 5), n=1, size=(7, 6), stride=(2, 2), padding=(2, 2), groups=3),
    # Six channels: with few pixels that meet a tap, the sums of P of three all came out near zero, twenty times smaller than their terms.
    "depthwise 2x3, stride 3 and 5": Case(6, 6, (2, 3), size=(8, 9), stride=(3, 5), padding=(0, 2), groups=6),
    "depthwise 1x9, one row": Case(3, 3, (1, 9), size=(1, 11), padding=(0, 4), groups=3),
    "depthwise 2x3, uneven": Case(6, 6, (2, 3), n=1, stride=(3, 1), padding=(1, 0), groups=6),
}


def draw(case: Case, act: str, dtype: torch.dtype, *, gated: bool = False, plain: bool = False) -> dict[str, Any]:
    """Random arguments; the mean of x is far from zero beside its deviation."""
    mean = torch.randn(case.c) * 3
    gate = torch.rand(case.n, case.c) if gated else None
    x = (torch.randn(case.n, case.c, *case.size) + mean.view(1, -1, 1, 1)).to(dtype)
    vectors = (None, None, None) if plain else (mean, torch.rand(case.c) + 0.5, torch.randn(case.c))
    weight = torch.randn(case.out, case.c // case.groups, *case.kernel).to(dtype)
    return {"x": x, "transform": Transform(*vectors, act, gate), "weight": weight, "bias": torch.randn(case.out)}


def draw_edge(case: Case, dtype: torch.dtype) -> tuple[Tensor, BackwardEdge]:
    """P and an edge with all its vectors."""
    mean = torch.randn(case.out) * 2
    y = (torch.randn(case.output) + mean.view(1, -1, 1, 1)).to(dtype)
    s, a, b = torch.rand(case.out) + 0.5, torch.randn(case.out) * 0.2, torch.randn(case.out)
    return torch.randn(case.output).to(dtype), BackwardEdge(s, a, b, y, mean)


def run_forward(
    implementation: Any, a: dict[str, Any], case: Case, dtype: torch.dtype, **options: Any
) -> tuple[Any, ...]:
    return implementation.run(ConvForward(a["x"], a["transform"], a["weight"], a["bias"], case.geometry, dtype, **options))


def run_backward(
    implementation: Any,
    p: Tensor,
    edge: BackwardEdge,
    a: dict[str, Any],
    case: Case,
    dtype: torch.dtype,
    **options: Any,
) -> tuple[Any, ...]:
    return tuple(implementation.run(ConvBackward(p, edge, a["x"], a["transform"], a["weight"], case.geometry, dtype, **options)))


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: to_double(value) for name, value in arguments.items()}


def check(case: Case, act: str, dtype: torch.dtype, **options: bool) -> None:
    """Forward with bias and statistics, then all gradients, against the reference."""
    a = draw(case, act, dtype, **options)
    values = run_forward(FUSED, a, case, dtype, statistics=True)
    truth = run_forward(REFERENCE, doubled(a), case, torch.float64, statistics=True)
    assert_as_good("forward", values, run_forward(REFERENCE, a, case, dtype, statistics=True), truth)

    p, edge = draw_edge(case, dtype)
    values = run_backward(FUSED, p, edge, a, case, dtype)
    truth = run_backward(REFERENCE, p.double(), to_double(edge), doubled(a), case, torch.float64)
    assert_as_good("backward", values, run_backward(REFERENCE, p, edge, a, case, dtype), truth)


@pytest.mark.parametrize("name", CASES)
def test_every_shape(name: str) -> None:
    check(CASES[name], "relu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["1x1", "1x1, channels in eights", "3x3, stride 2", "3x3, few channels", "depthwise 3x3, stride 2"])
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], "relu", dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_every_activation(kind: str, act: str) -> None:
    case = Case(4, 5, (2, 2), n=1, size=(4, 3), padding=(1, 0))
    if kind == "depthwise":
        case = Case(4, 4, (2, 2), n=1, size=(4, 3), padding=(1, 0), groups=4)
    check(case, act, torch.float32)


@pytest.mark.parametrize(
    "name", ["1x1", "3x3", "3x3, few channels", "3x3, groups", "depthwise 3x3", "depthwise 3x3, stride 2"]
)
def test_gate(name: str) -> None:
    check(CASES[name], "silu", torch.float32, gated=True)


@pytest.mark.parametrize("name", ["1x1", "3x3", "depthwise 3x3"])
@pytest.mark.parametrize("act", ["identity", "relu"])
def test_without_a_normalisation(name: str, act: str) -> None:
    check(CASES[name], act, torch.float32, plain=True)


@pytest.mark.own_tiles
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2", "3x3, few channels", "1x1, groups", "depthwise 3x3"])
def test_the_rules_own_tiles(name: str) -> None:
    check(CASES[name], "relu", torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2", "depthwise 3x3"])
def test_layouts(name: str, layout: str) -> None:
    """Every tensor in every layout; ``out`` and ``accumulate`` are written in place, and nothing around a slice."""
    case, dtype = CASES[name], torch.float32
    a = draw(case, "relu", dtype)
    p, edge = draw_edge(case, dtype)
    truth = run_forward(REFERENCE, doubled(a), case, torch.float64, statistics=True)
    before = torch.randn_like(a["x"])
    gradients = run_backward(
        REFERENCE, p.double(), to_double(edge), doubled(a), case, torch.float64, accumulate=before.double()
    )

    a["x"] = in_layout(a["x"], layout)
    out = in_layout(torch.full(case.output, torch.nan), layout)
    value = run_forward(FUSED, a, case, dtype, statistics=True, out=out)
    assert value[0] is out
    for found, expected in zip(value, truth, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    own = in_layout(before, layout)
    edge = BackwardEdge(edge.s, edge.a, edge.b, in_layout(edge.y, layout), edge.mean)
    found = run_backward(FUSED, in_layout(p, layout), edge, a, case, dtype, accumulate=own)
    assert found[0] is own
    for ours, expected in zip(found, gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-3)
    if layout == "slice":  # in_layout puts NaN around the slice
        for view in (out, own):
            assert torch.as_strided(view, view.shape, view.stride(), view.storage_offset() - 3)[:, :3].isnan().all()


@pytest.mark.parametrize("edge", ["P alone", "s", "a and b", "still to be divided"])
@pytest.mark.parametrize("name", ["1x1", "3x3", "1x1, stride 3 and padding", "depthwise 3x3, stride 2"])
def test_partial_edges(name: str, edge: str) -> None:
    case = CASES[name]
    a = draw(case, "relu", torch.float32)
    p, full = draw_edge(case, torch.float32)
    chosen = {
        "P alone": BackwardEdge(),
        "s": BackwardEdge(full.s),
        "a and b": BackwardEdge(None, full.a, full.b, full.y, full.mean),
        "still to be divided": BackwardEdge(full.s, full.a * 5, full.b * 10, full.y, full.mean, 10),
    }
    arguments = (p, chosen[edge], a, case, torch.float32)
    truth = run_backward(REFERENCE, p.double(), to_double(chosen[edge]), doubled(a), case, torch.float64)
    assert_as_good("backward", run_backward(FUSED, *arguments), run_backward(REFERENCE, *arguments), truth)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)], ids=str
)
@pytest.mark.parametrize("name", ["1x1", "depthwise 3x3"])
def test_only_what_is_needed(name: str, needs: tuple[bool, bool, bool]) -> None:
    case = CASES[name]
    a = draw(case, "relu", torch.float32)
    p, edge = draw_edge(case, torch.float32)
    found = run_backward(FUSED, p, edge, a, case, torch.float32, needs=needs)
    expected = run_backward(REFERENCE, p, edge, a, case, torch.float32, needs=needs)
    assert [g is None for g in found] == [g is None for g in expected]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["3x3", "3x3, few channels", "depthwise 3x3"])
def test_weight_gradient_keeps_its_memory_format(name: str, layout: torch.memory_format) -> None:
    case = CASES[name]
    a = draw(case, "relu", torch.float32)
    a["weight"] = a["weight"].contiguous(memory_format=layout)
    p, edge = draw_edge(case, torch.float32)
    found = FUSED.run(ConvBackward(
        p, edge, a["x"], a["transform"], a["weight"], case.geometry, dtype=torch.float32, needs=(False, True, False)
    ))
    assert found.weight.stride() == a["weight"].stride()


@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2", "3x3, few channels", "depthwise 3x3"])
def test_64_bit_offsets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of more than 2^31 elements do not fit here, so small ones are treated as such."""
    monkeypatch.setattr(Pixels, "wide", property(lambda self: True))
    check(CASES[name], "relu", torch.float32)


def test_mixed_types() -> None:
    """Autocast: fp32 activations and weights, computed and stored in bf16; dx comes back in fp32."""
    case = CASES["3x3"]
    a = draw(case, "relu", torch.float32)
    p, edge = draw_edge(case, torch.bfloat16)
    truth = run_forward(REFERENCE, doubled(a), case, torch.float64, statistics=True)
    forwards = [run_forward(m, a, case, torch.bfloat16, statistics=True) for m in (FUSED, REFERENCE)]
    assert_as_good("forward", *forwards, truth)
    truth = run_backward(REFERENCE, p.double(), to_double(edge), doubled(a), case, torch.float64)
    assert_as_good("backward", *(run_backward(m, p, edge, a, case, torch.bfloat16) for m in (FUSED, REFERENCE)), truth)


def test_the_same_bits_every_time() -> None:
    case = CASES["3x3"]
    a = draw(case, "relu", torch.float32)
    p, edge = draw_edge(case, torch.float32)
    first, second = (run_backward(FUSED, p, edge, a, case, torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True) if x is not None)


def test_a_variance_beside_a_mean_a_million_times_its_deviation() -> None:
    """The mean of a tile is rounded by a part of the deviation. What the squares are then too large by is taken away again."""
    values = 4_000_000 + torch.randint(-3, 4, (2, 16, 8, 16)).float()  # whole numbers, of which float32 has every one
    weight = torch.eye(16).view(16, 16, 1, 1)
    geometry = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
    result = FUSED.run(ConvForward(values, Transform(), weight, None, geometry, torch.float32, True))
    truth = values.double().var((0, 2, 3), unbiased=False)
    assert ((result.var - truth).abs() / truth).max() < 1e-3
