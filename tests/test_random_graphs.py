"""400 random CNNs a run, new ones each time, trained beside their restructured copies in fp64.

Each run prints its seed: BNR_RANDOM_SEED=12345 repeats it; BNR_RANDOM_GRAPHS=1000 makes a longer one.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from equivalence import assert_same_training
from random_graphs import build_complete, build_from_source, write_model

import bnrestructure
from bnrestructure.capture.regions import captured
from bnrestructure.passes.pipeline import LADDER, PASSES

_SEED = int(os.environ["BNR_RANDOM_SEED"])  # a new one each run, from conftest.py
_GRAPHS = int(os.environ.get("BNR_RANDOM_GRAPHS", "400"))
_GROUPS = 10

#: Beside the whole pipeline, which every graph gets: one other choice of passes for each graph.
_OTHER_OPTIONS = [{"passes": rung} for rung in LADDER] + [{"passes": PASSES[:n]} for n in range(1, len(PASSES))]


@pytest.mark.parametrize("group", range(_GROUPS))
def test_random_graphs(group: int) -> None:
    for index in range(group, _GRAPHS, _GROUPS):
        _check(_SEED + index)


def _check(seed: int) -> None:
    written = write_model(seed)
    rng = random.Random(seed)
    x = torch.randn(
        written.batch, written.channels, written.size, written.size, dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    if rng.random() < 0.3:
        x = x.to(memory_format=torch.channels_last)
    options = rng.choice([{"fuel": rng.randint(1, 25)}, *_OTHER_OPTIONS]) if rng.random() < 0.3 else {}
    try:
        assert_same_training(build_from_source(written), x, steps=2, options=options, allow_noise=True)
    except Exception as error:  # whatever went wrong, the graph that it went wrong with belongs to the message
        raise AssertionError(
            f"random graph {seed} (BNR_RANDOM_SEED={seed} BNR_RANDOM_GRAPHS=1), options {options}: {error}\n\n{written.reproducer}"
        ) from error


def test_generator_repeats_itself_and_covers_what_it_should() -> None:
    sources = [write_model(seed).source for seed in range(200)]
    assert sources == [write_model(seed).source for seed in range(200)]
    text = "\n".join(sources)
    for part in (
        "torch.cat", "+=", "F.batch_norm", "inplace=True", "MaxPool2d", "adaptive_avg_pool2d", ".eval()", "momentum=None",
        "isinstance", "except TypeError", "Tripled.apply", "halves(", "register_forward_hook", "bernoulli_", "nn.GRU", "F.pad",
        ".expand_as", "torch.linspace", ".split((",
    ):  # fmt: skip
        assert part in text


def test_random_graphs_are_rewritten_at_all() -> None:
    """Most sites of random graphs are fused at least in part: the comparison above is not of eager with eager."""
    counts = {"fused": 0, "partial": 0, "kept": 0}
    for seed in range(20):
        model = build_complete(write_model(seed))
        captured(model, type(model).forward)  # raises if the tracer gives up
        for status, count in bnrestructure.explain(model, backend="reference").counts.items():
            counts[status] += count
    assert counts["fused"] > counts["kept"]
    assert counts["fused"] + counts["partial"] > 4 * counts["kept"]
