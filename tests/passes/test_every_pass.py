"""What holds for each of the nine passes: it means the same, says truly what it did, does it all at once, and stops when out of fuel."""

from __future__ import annotations

import copy

import pytest
from equivalence import assert_same_values, training_step
from pass_tools import after, graph_text, make_pass, prefix_before, run_pass, site_graph
from random_graphs import build_complete, write_model
from small_models import SMALL_MODELS, build, input_for

from bnrestructure import UsageError
from bnrestructure.passes.pipeline import LADDER, PASSES, resolve, steps

each_pass = pytest.mark.parametrize("name", PASSES)
each_model = pytest.mark.parametrize("model_name", SMALL_MODELS)


@each_pass
@each_model
def test_after_its_predecessors(name: str, model_name: str) -> None:
    """Values and gradients equal; ``modified`` and ``count`` true; the second run finds nothing; the graph is well formed."""
    model, x = build(model_name), input_for(model_name)
    gm = after(copy.deepcopy(model), *prefix_before(name))
    before = graph_text(gm)
    result = make_pass(name)(gm)
    assert result.graph_module is gm
    assert result.modified == (result.count > 0) == (graph_text(gm) != before)
    gm.graph.lint()
    once = graph_text(gm)
    again = make_pass(name)(gm)
    assert (again.modified, again.count) == (False, 0)
    assert graph_text(gm) == once
    assert_same_values(training_step(gm, x), training_step(site_graph(model), x))


@each_pass
def test_alone_on_a_captured_graph(name: str) -> None:
    for model_name in SMALL_MODELS:
        model, x = build(model_name), input_for(model_name)
        gm, result = run_pass(copy.deepcopy(model), name)
        assert result.modified == (graph_text(gm) != graph_text(site_graph(model)))
        assert not make_pass(name)(gm).modified
        if result.modified:
            assert_same_values(training_step(gm, x), training_step(site_graph(model), x))


@pytest.mark.parametrize("name", PASSES[:-1])
def test_fuel_bounds_the_rewrites(name: str) -> None:
    """All but select-kernels, which is no rewrite: without it nothing runs on the backend that was asked for."""
    for model_name in SMALL_MODELS:
        full = run_pass(build(model_name), name, *prefix_before(name))[1].count
        for fuel in {0, 1, full // 2, full, full + 5}:
            gm = after(build(model_name), *prefix_before(name))
            before = graph_text(gm)
            result = make_pass(name, fuel=fuel)(gm)
            assert result.count <= fuel
            assert result.modified == (graph_text(gm) != before)
            if fuel == 0:
                assert not result.modified
            if fuel > full:
                assert result.count == full


def test_a_second_run_finds_nothing_in_random_graphs() -> None:
    for seed in range(25):
        gm = site_graph(build_complete(write_model(seed)).train())
        for step in steps(PASSES, "reference"):
            step(gm)
            assert (seed, step.name, step(gm).count) == (seed, step.name, 0)


def test_every_pass_fires_somewhere() -> None:
    fired = dict.fromkeys(PASSES, 0)
    for model_name in SMALL_MODELS:
        gm = site_graph(build(model_name))
        for step in steps(PASSES, "reference"):
            fired[step.name] += step(gm).count
    assert all(fired.values()), fired


def test_a_tank_of_fuel_is_shared_by_the_pipeline() -> None:
    for fuel in (0, 3, 7):
        gm = site_graph(build("residual"))
        assert sum(step(gm).count for step in steps(PASSES[:-1], "auto", fuel)) == fuel


def test_passes_are_frozen_and_named() -> None:
    for name in PASSES:
        made = make_pass(name)
        assert made.name == name
        with pytest.raises(AttributeError):
            made.fuel = None  # type: ignore[misc, assignment]


def test_ladder() -> None:
    assert list(LADDER) == ["baseline", "rcf", "mvf", "bnff", "icf"]
    assert resolve(None) == PASSES
    assert resolve("baseline") == ()
    assert resolve("fission") == ("fission",)
    for rung in LADDER:
        assert set(resolve(rung)) <= set(PASSES)
    with pytest.raises(UsageError, match="did you mean 'bnff'"):
        resolve("bnf")


def test_the_order_is_the_pipelines() -> None:
    assert resolve(["fission", "fuse-join"]) == ("fission", "fuse-join")
    assert resolve(LADDER["mvf"]) == LADDER["mvf"]
    with pytest.raises(UsageError, match="'fuse-residual' comes before 'chain-readers'"):
        resolve([*LADDER["bnff"], "fuse-residual"])
