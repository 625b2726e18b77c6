"""A check to copy into your own CI: the models you train still compute the same thing once they are restructured.

Replace the names by a function that builds *your* model, and the random images by a batch of the shape you train on.

    pytest examples/test_equivalence.py
"""

from __future__ import annotations

import pytest
import torch
import torchvision

import bnrestructure

MODELS = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"]


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(request.param, weights=None)


def test_training_is_equivalent(model: torch.nn.Module) -> None:
    """Outputs, every gradient, every buffer, and all of them again after optimiser steps, judged against float64."""
    report = bnrestructure.verify(model, images())
    assert report.ok, str(report)


def test_every_batch_norm_is_accounted_for(model: torch.nn.Module) -> None:
    """A layer added later that cannot be fused shows up here with its reason, not in next week's memory use."""
    plan = bnrestructure.explain(model)
    assert plan.counts["kept"] == 0, str(plan)


def test_checkpoints_are_interchangeable(model: torch.nn.Module) -> None:
    before = model.state_dict()
    bnrestructure.restructure(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[key] is before[key] or torch.equal(after[key], before[key]) for key in before)
