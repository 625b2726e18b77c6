"""The plan's shapes, found by a forward on the meta device."""

from __future__ import annotations

import torch
from torch import nn

import bnrestructure


def test_a_cumulative_average_does_not_end_them() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None)
    )
    plan = bnrestructure.explain(model, torch.zeros(2, 3, 9, 9), backend="reference")
    assert [site.shape for site in plan.sites] == [(2, 4, 7, 7), (2, 5, 5, 5)]
    assert all(m.momentum is None for m in model.modules() if isinstance(m, nn.BatchNorm2d))
