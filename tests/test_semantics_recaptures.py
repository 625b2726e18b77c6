"""An attribute that is another one in each call: the part that reads it runs as it was, the parts inside of it stay rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from torch import Tensor, nn

import bnrestructure
from bnrestructure.capture.recaptures import Recaptures

pytestmark = pytest.mark.filterwarnings("ignore:bnrestructure.*is captured for the 3rd time")


def _trunk() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


class _Scheduled(nn.Module):
    """A factor, a mask or a configuration that somebody sets, and a trunk that reads none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.factor = _trunk(), 1.0
        self.options: Any = {"power": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.trunk(x)
        return y * self.factor + self.options["power"]


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _factor(m: Any, step: int) -> None:
    m.factor = 1.0 + step


def _options(m: Any, step: int) -> None:
    m.options = {"power": float(step)}


@pytest.mark.parametrize("change", [_factor, _options])
def test_what_changes_in_each_call_is_captured_a_few_times_and_the_trunk_stays_rewritten(change: Any) -> None:
    model = _Scheduled().double()
    rewritten = restructured_copy(model)
    for step in range(20):
        change(model, step)
        change(rewritten, step)
        assert_same_values(training_step(rewritten, X), training_step(model, X))
    plan = bnrestructure.explain(rewritten)
    assert plan.captures == {"the whole model": 9, "trunk": 1}
    (site,) = plan.sites
    assert (site.status, site.ran) == ("fused", True)
    attribute = "factor" if change is _factor else "options"
    note = f"the model: ran as it was: {attribute} of the model is another one in each call, and each would need a capture of its own"
    assert note in plan.notes


def test_an_attribute_that_settles_is_captured_again() -> None:
    model = _Scheduled().double()
    rewritten = restructured_copy(model)
    for step in range(90):
        if step < 30:
            _factor(model, step)
            _factor(rewritten, step)
        assert_same_values(training_step(rewritten, X), training_step(model, X))
    assert bnrestructure.explain(rewritten).captures["the whole model"] == 10


def test_values_that_come_again_keep_their_programs() -> None:
    model = _Scheduled().double()
    rewritten = restructured_copy(model)
    for step in range(60):
        _factor(model, step % 12 if step % 4 else 0)
        _factor(rewritten, step % 12 if step % 4 else 0)
        assert_same_values(training_step(rewritten, X), training_step(model, X))
    plan = bnrestructure.explain(rewritten)
    assert plan.captures == {"the whole model": 10}
    assert not any("another one in each call" in note for note in plan.notes)


def test_strict_says_so() -> None:
    model = bnrestructure.restructure(_Scheduled().double(), strict=True)
    for step in range(9):
        _factor(model, step)
        model(X)
    _factor(model, 9)
    with pytest.raises(bnrestructure.NotFullyFusedError, match="factor of the model is another one in each call"):
        model(X)


def test_tries_are_ever_further_apart() -> None:
    recaptures, tried = Recaptures(), []
    for call in range(600):
        if recaptures.worth_another("a structure"):
            tried.append(call)
    assert tried == [*range(8), 72, 201, 458]
    recaptures.used("another structure")
    assert not recaptures.worth_another("a structure")
    recaptures.used("a structure")
    assert recaptures.worth_another("a structure")


class _Buffered(nn.Module):
    """What docs/reasons.md advises: the number is in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.trunk(x)
        return y * self.factor


def test_a_number_in_a_buffer_may_change_in_each_call() -> None:
    model: Any = _Buffered().double()
    rewritten: Any = restructured_copy(model)
    for step in range(4):
        model.factor.fill_(step)
        rewritten.factor.fill_(step)
        assert_same_values(training_step(rewritten, X), training_step(model, X))
    assert bnrestructure.explain(rewritten).captures == {"the whole model": 1}
