"""The convolution as ATen's product between Triton sweeps, interpreted, and what the node does with its candidates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.cpu_checks import LAYOUTS, assert_as_good, in_layout, to_double
from test_convolution import CASES, Case, doubled, draw, draw_edge, run_backward, run_forward

from bnrestructure.core.edges import BackwardEdge
from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import ConvForward
from bnrestructure.kernels.cuda import KERNELS, rule
from bnrestructure.kernels.cuda.rule import BACKWARD
from bnrestructure.kernels.reference import REFERENCE

HYBRID = KERNELS.convolutions.by("hybrid")


def check(implementation: Any, case: Case, act: str, dtype: torch.dtype, **options: bool) -> None:
    """Forward with bias and statistics, then all gradients, accumulated, against fp64."""
    a = draw(case, act, dtype, **options)
    truth = run_forward(REFERENCE, doubled(a), case, torch.float64, statistics=True)
    values, others = (run_forward(m, a, case, dtype, statistics=True) for m in (implementation, REFERENCE))
    assert_as_good("forward", values, others, truth)
    p, edge = draw_edge(case, dtype)
    before = torch.randn_like(a["x"])
    truth = run_backward(REFERENCE, p.double(), to_double(edge), doubled(a), case, torch.float64, accumulate=before.double())
    values, others = (run_backward(m, p, edge, a, case, dtype, accumulate=before.clone()) for m in (implementation, REFERENCE))
    assert_as_good("backward", values, others, truth)


@pytest.mark.parametrize("name", CASES)
def test_every_shape(name: str) -> None:
    check(HYBRID, CASES[name], "relu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2", "depthwise 3x3"])
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    check(HYBRID, CASES[name], "silu", dtype)


@pytest.mark.own_tiles
def test_the_rules_own_tiles() -> None:
    check(HYBRID, CASES["3x3"], "relu", torch.bfloat16)


@pytest.mark.parametrize("act", ["identity", "relu"])
def test_without_a_normalisation(act: str) -> None:
    check(HYBRID, CASES["3x3"], act, torch.float32, plain=True)


@pytest.mark.parametrize("edge", ["P alone", "s", "a and b", "still to be divided"])
def test_partial_edges(edge: str) -> None:
    case = CASES["3x3, stride 2"]
    a = draw(case, "relu", torch.float32)
    p, full = draw_edge(case, torch.float32)
    chosen = {
        "P alone": BackwardEdge(),
        "s": BackwardEdge(full.s),
        "a and b": BackwardEdge(None, full.a, full.b, full.y, full.mean),
        "still to be divided": BackwardEdge(full.s, full.a * 5, full.b * 10, full.y, full.mean, 10),
    }[edge]
    for needs in ((True, True, False), (True, True, True), (False, False, True), (False, True, False), (True, False, False)):
        truth = run_backward(REFERENCE, p.double(), to_double(chosen), doubled(a), case, torch.float64, needs=needs)
        ours, theirs = (run_backward(m, p, chosen, a, case, torch.float32, needs=needs) for m in (HYBRID, REFERENCE))
        assert [g is None for g in ours] == [g is None for g in theirs], needs
        assert_as_good("backward", ours, theirs, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """``out`` and ``accumulate`` are written in place, whatever their layout, and so is nothing around a slice."""
    case, dtype = CASES["3x3"], torch.float32
    a = draw(case, "relu", dtype)
    p, edge = draw_edge(case, dtype)
    before = torch.randn_like(a["x"])
    truth = run_forward(REFERENCE, doubled(a), case, torch.float64, statistics=True)
    gradients = run_backward(REFERENCE, p.double(), to_double(edge), doubled(a), case, torch.float64, accumulate=before.double())
    a["x"] = in_layout(a["x"], layout)
    out, own = in_layout(torch.full(case.output, torch.nan), layout), in_layout(before, layout)
    value = run_forward(HYBRID, a, case, dtype, statistics=True, out=out)
    edge = BackwardEdge(edge.s, edge.a, edge.b, in_layout(edge.y, layout), edge.mean)
    found = run_backward(HYBRID, in_layout(p, layout), edge, a, case, dtype, accumulate=own)
    assert value[0] is out
    assert found[0] is own
    for ours, expected in zip((*value, *found), (*truth, *gradients), strict=True):
        if expected is not None:
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-3)
    if layout == "slice":  # in_layout puts NaN around the slice
        for view in (out, own):
            assert torch.as_strided(view, view.shape, view.stride(), view.storage_offset() - 3)[:, :3].isnan().all()


def test_mixed_types() -> None:
    """Autocast: fp32 activations and weights, computed and stored in bf16; dx comes back in fp32."""
    case = CASES["3x3"]
    a = draw(case, "relu", torch.float32)
    p, edge = draw_edge(case, torch.bfloat16)
    truth = run_forward(REFERENCE, doubled(a), case, torch.float64, statistics=True)
    pair = (HYBRID, REFERENCE)
    assert_as_good("forward", *(run_forward(m, a, case, torch.bfloat16, statistics=True) for m in pair), truth)
    truth = run_backward(REFERENCE, p.double(), to_double(edge), doubled(a), case, torch.float64)
    assert_as_good("backward", *(run_backward(m, p, edge, a, case, torch.bfloat16) for m in pair), truth)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weight_gradient_keeps_its_memory_format(layout: torch.memory_format) -> None:
    case = CASES["3x3"]
    a = draw(case, "relu", torch.float32)
    a["weight"] = a["weight"].contiguous(memory_format=layout)
    p, edge = draw_edge(case, torch.float32)
    found = run_backward(HYBRID, p, edge, a, case, torch.float32, needs=(False, True, False))
    assert found[4].stride() == a["weight"].stride()


# --- the choice among them ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for measurements."""
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", str(tmp_path))
    tuning.forget()
    yield tmp_path
    monkeypatch.undo()
    tuning.forget()


@pytest.mark.parametrize("name", list(BACKWARD))
def test_every_choice_gives_the_right_numbers(name: str) -> None:
    forward = KERNELS.convolutions.by("hybrid" if name not in ("depthwise", "reference") else name)
    both = SimpleNamespace(run=lambda call: (forward if isinstance(call, ConvForward) else KERNELS.convolutions.by(name)).run(call))
    check(both, CASES["depthwise 3x3" if name == "depthwise" else "3x3"], "relu", torch.float32)


@pytest.mark.parametrize(
    ("name", "gated", "forward", "backward"),
    [
        ("3x3", False, ["fused", "hybrid", "reference"], [*list(BACKWARD)[:4], "reference"]),
        ("3x3", True, ["fused", "reference"], ["fused", "reference"]),
        ("depthwise 3x3", False, ["depthwise", "hybrid", "reference"], ["depthwise", "hybrid", "reference"]),
    ],
)
@pytest.mark.parametrize("slowest_first", [False, True])
def test_a_node_is_measured_once_and_runs_what_was_fastest(
    name: str, gated: bool, forward: list[str], backward: list[str], slowest_first: bool,
    cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a clock of the test's: every candidate has run, the winner is what runs next, and the file is the GPU's own."""
    ticks: list[float] = []

    def clock(run: Any) -> float:
        run()
        ticks.append((0.9 if slowest_first else 1.1) ** len(ticks))
        return ticks[-1]

    monkeypatch.setattr(tuning, "wall_clock", clock)
    monkeypatch.setattr(tuning, "_TURNS", 2)  # each takes seconds in the interpreter
    case = CASES[name]
    a = draw(case, "relu", torch.float32, gated=gated)
    p, edge = draw_edge(case, torch.float32)
    before = torch.randn_like(a["x"])
    with tuning.measuring() as found:
        value = run_forward(KERNELS, a, case, torch.float32, statistics=True)
        own = before.clone()
        gradients = run_backward(KERNELS, p, edge, a, case, torch.float32, accumulate=own)
        run_forward(KERNELS, a, case, torch.float32, statistics=True)
    assert [list(m.milliseconds) for m in found] == [forward, backward]
    assert [m.choice for m in found] == ([forward[-1], backward[-1]] if slowest_first else [forward[0], backward[0]])
    assert len(ticks) == tuning._TURNS * (len(forward) + len(backward))
    truth = run_backward(REFERENCE, p.double(), to_double(edge), doubled(a), case, torch.float64, accumulate=before.double())
    others = run_backward(REFERENCE, p, edge, a, case, torch.float32, accumulate=before.clone())
    assert_as_good("measuring leaves the gradient alone", gradients, others, truth)
    expected = run_forward(REFERENCE, doubled(a), case, torch.float64, statistics=True)
    assert_as_good("forward", value, run_forward(REFERENCE, a, case, torch.float32, statistics=True), expected)
    (file,) = cache.iterdir()
    assert '"gpu": "Triton\'s interpreter"' in file.read_text()


def test_another_gpu_has_choices_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["1x1"]
    a = draw(case, "relu", torch.float32)
    monkeypatch.setattr(tuning, "wall_clock", lambda run: float(len(run())))
    measured = []
    for gpu in ("GPU A", "GPU B", "GPU A"):
        monkeypatch.setattr(rule, "gpu_of", lambda device, gpu=gpu: gpu)
        with tuning.measuring() as found:
            run_forward(KERNELS, a, case, torch.float32, statistics=True)
        measured.append(len(found))
    assert measured == [1, 1, 0]
    assert len(list(cache.iterdir())) == 2
