"""The plan's shapes, found by a forward on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


def test_a_cumulative_average_does_not_end_them() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None)
    )
    plan = bnrestructure.explain(model, torch.zeros(2, 3, 9, 9), backend="reference")
    assert [site.shape for site in plan.sites] == [(2, 4, 7, 7), (2, 5, 5, 5)]
    assert all(m.momentum is None for m in model.modules() if isinstance(m, nn.BatchNorm2d))


class Head(nn.Module):
    """Takes a list of maps, each with convolutions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(n, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)) for n in (6, 8)]
        )

    def forward(self, maps: list[Tensor], scale: float) -> list[Tensor]:
        return [tower(x) * scale for tower, x in zip(self.towers, maps, strict=True)]


class Detector(nn.Module):
    """Reads values before it calls its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2), Head()

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.sum().item() > 1e9:
            raise ValueError("too large")
        y = self.first(x)
        maps: list[Tensor] = self.head([y, self.second(y)], scale=0.5)
        return maps


def test_a_part_is_planned_with_what_the_model_calls_it_with() -> None:
    """Where the model as a whole cannot be followed. A forward on the meta device could not tell either."""
    model = Detector()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    plan = bnrestructure.explain(model, torch.zeros(2, 3, 9, 9), backend="reference")
    assert plan.regions == ["head"]
    assert [(site.status, site.shape) for site in plan.sites] == [("fused", (2, 4, 9, 9)), ("fused", (2, 4, 4, 4))]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(bnrestructure.UsageError, match=r"does not take this input \(2x4x9x9\)"):
        bnrestructure.explain(Detector(), torch.zeros(2, 4, 9, 9), backend="reference")


class Blur(nn.Module):
    """Convolves by function, with a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.ones(4, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filter, stride=2, groups=4)


def test_a_convolution_by_function_has_no_kernel_listed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Blur(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    plan = bnrestructure.explain(model, torch.zeros(2, 3, 9, 9), backend="reference")
    assert plan.counts["fused"] == 2
    assert [kernel.name for kernel in plan.kernels] == ["0", "6"]
