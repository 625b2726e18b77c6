"""Each small model trains the same restructured, with all passes and on every rung of the ladder; and nothing is kept silently."""

from __future__ import annotations

import copy

import pytest
import torch
from equivalence import assert_same_training, assert_same_values, restructured_copy, training_step
from small_models import SMALL_MODELS, build, input_for

import bnrestructure
from bnrestructure.passes.pipeline import LADDER, PASSES


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_trains_the_same(name: str) -> None:
    assert_same_training(build(name), input_for(name))


@pytest.mark.parametrize("rung", LADDER)
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_rung_of_the_ladder_trains_the_same(name: str, rung: str) -> None:
    assert_same_training(build(name), input_for(name), steps=1, options={"passes": rung})


@pytest.mark.parametrize("length", range(1, len(PASSES)))
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_prefix_of_the_pipeline_trains_the_same(name: str, length: int) -> None:
    assert_same_training(build(name), input_for(name), steps=1, options={"passes": PASSES[:length]})


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_pass_alone_trains_the_same(name: str) -> None:
    for single in PASSES:
        assert_same_training(build(name), input_for(name), steps=1, options={"passes": single})


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_any_amount_of_fuel_trains_the_same(name: str) -> None:
    model, x = build(name), input_for(name)
    expected = training_step(copy.deepcopy(model), x)
    for fuel in range(0, 40, 3):
        assert_same_values(training_step(restructured_copy(model, fuel=fuel), x), expected)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_plan_accounts_for_every_batch_norm(name: str) -> None:
    model = build(name)
    calls = 3 if name == "functional" else sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    plan = bnrestructure.explain(model, backend="reference")
    assert len(plan.sites) == calls
    assert all((site.reason is None) == (site.status == "fused") for site in plan.sites)
    assert sum(plan.counts.values()) == calls


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_batch_and_image_size_are_not_burnt_in(name: str) -> None:
    rewritten, original = restructured_copy(build(name)), build(name)
    for batch, size in ((4, 12), (3, 16), (2, 20), (4, 12)):
        x = input_for(name, batch=batch, size=size, seed=batch)
        assert_same_values(training_step(rewritten, x), training_step(original, x))
