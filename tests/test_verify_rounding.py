"""Models whose own rounding goes further than the verifier's limit in float64 are judged by that, and by nothing wider."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bnrestructure import VerificationReport, verify
from bnrestructure.kernels import reference
from bnrestructure.kernels.calls import FinalizeForward, FinalizeResult
from bnrestructure.verification.judge import FLOAT64_LIMIT, judge_double, judge_training
from bnrestructure.verification.rounding import RandomRounding
from bnrestructure.verification.trial import Trial


def check(spread: float) -> VerificationReport:
    """A batch norm of values that differ by ``spread`` of themselves, and so are known to 1e-16 / spread of that difference."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-24), nn.ReLU(), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(*layers).double()
    nn.init.normal_(model[1].bias)
    x = 1 + spread * torch.randn(4, 3, 9, 7, dtype=torch.float64)
    return verify(model, x, steps=1, backend="reference")


def test_an_ill_conditioned_model_is_judged_by_its_own_rounding() -> None:
    report = check(1e-7)
    assert report.ok, report
    assert any(c.error > FLOAT64_LIMIT for c in report.comparisons)
    assert any(note.startswith("ill-conditioned: control ") for note in report.notes)
    (output,) = (c for c in report.comparisons if (c.stage, c.kind) == ("float64", "output"))
    assert output.eager_error is not None
    assert FLOAT64_LIMIT < output.limit == report.factor * output.eager_error < 1e-7


def test_a_well_conditioned_model_keeps_the_limit() -> None:
    report = check(1.0)
    assert report.ok, report
    assert not report.notes
    assert {c.limit for c in report.comparisons if c.stage == "float64"} == {FLOAT64_LIMIT}


def test_a_broken_rewrite_of_an_ill_conditioned_model_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reference.RUN[FinalizeForward]

    def slightly_wrong(call: FinalizeForward) -> FinalizeResult:
        found: FinalizeResult = original(call)
        return found._replace(beta=found.beta * (1 + 1e-5))

    monkeypatch.setitem(reference.RUN, FinalizeForward, slightly_wrong)
    report = check(1e-7)
    assert not report.ok
    assert "output" in report.failed_kinds


def test_an_infinite_distance_is_no_measure() -> None:
    key = (1, "output", "output")
    (found,) = judge_double(Trial(double={key: 1.0}), [Trial(double={key: math.inf})], factor=2.0)
    assert found.limit == FLOAT64_LIMIT
    (found,) = judge_double(Trial(double={key: math.inf}), [Trial(double={key: 1.0})], factor=2.0)
    assert not found.ok


def test_random_rounding_moves_every_new_value_a_little() -> None:
    x, narrow = torch.randn(1000, dtype=torch.float64), torch.randn(1000)
    before = x.clone()
    with RandomRounding(0):
        doubled, view, added = x * 2, x.view(10, 100), narrow + 1
    with RandomRounding(1):
        other = x * 2
    moved = (doubled / (before * 2) - 1).abs() / torch.finfo(torch.float64).eps
    assert 7 < moved.mean() < 9
    assert 14 < moved.max() < 17
    assert not torch.equal(doubled, other)
    assert torch.equal(view.flatten(), before)
    assert torch.equal(added, narrow + 1)


def judged(eager: list[float], ours: list[float]) -> list[bool]:
    """Whether each of a step's gradients passes."""
    keys = [(2, "gradient", f"w{i}") for i in range(len(eager))]
    trial = Trial(eager=dict(zip(keys, eager, strict=True)), ours=dict(zip(keys, ours, strict=True)))
    return [c.ok for c in judge_training([trial], torch.float32, factor=2.0)]


def test_where_the_originals_own_numbers_mean_nothing_nothing_follows_from_ours() -> None:
    assert judged([16.0, 3.0, 1.5, 0.1], [33.0, 90.0, 9.0, 5.0]) == [True] * 4
    assert judged([16.0, 3.0, 1.5, 0.1], [33.0, 90.0, math.inf, 5.0]) == [True, True, False, True]


def test_one_tensor_of_rounding_alone_leaves_the_others_their_limits() -> None:
    """The gradient of a bias before a batch norm: the limit follows from its own distance, and is finite."""
    assert judged([5.0, 0.1, 0.1, 0.1], [11.0, 0.1, 0.1, 0.1]) == [False, True, True, True]
    assert judged([0.9, 0.9, 0.9, 0.9], [2.0, 0.9, 0.9, 0.9]) == [False, True, True, True]


class Chaos(nn.Module):
    """Of its input's digits those that float32 does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e9 * x)


def test_the_report_says_of_what_nothing_follows() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Chaos(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    report = verify(nn.Sequential(*layers), torch.randn(4, 3, 9, 7), steps=1)
    (note,) = (note for note in report.notes if "decides nothing" in note)
    assert note.startswith("ill-conditioned: float32 decides nothing about ")
    assert {c.ok for c in report.comparisons if c.stage == "float32"} == {True}, report
