"""``x * sigmoid(x)`` and ``x * relu6(x + 3) / 6``, however they are written out, are the activations that kernels know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import site_graph
from stems import stem
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.graph.activations import activation_of


class _Net(nn.Module):
    """A batch norm between two convolutions, and what a model makes of its result."""

    def __init__(self, activation: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.bn, self.last, self.activation = stem(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), activation
        self.sigmoid, self.relu6, self.hardtanh, self.watched = nn.Sigmoid(), nn.ReLU6(inplace=True), nn.Hardtanh(0, 6), nn.Sigmoid()
        self.watched.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self, self.bn(self.stem(x))))


SILU: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "torch.sigmoid": lambda m, x: x * torch.sigmoid(x),
    "first": lambda m, x: torch.sigmoid(x) * x,
    "F.sigmoid": lambda m, x: x * F.sigmoid(x),
    "a method": lambda m, x: x.mul(x.sigmoid()),
    "in place": lambda m, x: x.mul_(x.sigmoid()),
    "a layer": lambda m, x: x * m.sigmoid(x),
    "torch.mul": lambda m, x: torch.mul(x, torch.sigmoid(x)),
}
HARDSWISH: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a sixth of the gate": lambda m, x: x * (F.relu6(x + 3) / 6),
    "a sixth of the product": lambda m, x: x * F.relu6(x + 3.0) / 6.0,
    "a layer in place": lambda m, x: x * m.relu6(x + 3) / 6,
    "a factor": lambda m, x: x * F.relu6(3 + x) * (1 / 6),
    "a clamp": lambda m, x: x * torch.clamp(x + 3, 0, 6) / 6,
    "a clamp by keyword": lambda m, x: x * x.add(3).clamp(min=0, max=6).div(6),
    "hardtanh": lambda m, x: x * F.hardtanh(x + 3, 0, 6) / 6,
    "its layer": lambda m, x: x * m.hardtanh(x + 3) / 6,
}
#: Products that are something else, or of which somebody reads a part.
OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another number": lambda m, x: x * F.relu6(x + 3) / 5,
    "another shift": lambda m, x: x * F.relu6(x + 2) / 6,
    "another clamp": lambda m, x: x * torch.clamp(x + 3, 0, 5) / 6,
    "no sixth": lambda m, x: x * F.relu6(x + 3),
    "a product with hardsigmoid": lambda m, x: x * F.hardsigmoid(x),
    "another gate": lambda m, x: x * torch.sigmoid(-x),
    "a gate that is read": lambda m, x: (lambda gate: x * gate + gate)(torch.sigmoid(x)),
    "an input that is read": lambda m, x: x * torch.sigmoid(x) + x,
    "a gate with hooks": lambda m, x: x * m.watched(x),
    "a sixth that is subtracted": lambda m, x: x * (F.relu6(x - 3) / 6),
    "a quotient the other way": lambda m, x: 6 / (x * F.relu6(x + 3) + 9),
}


def _activations(model: nn.Module) -> list[str]:
    """Those of a prepared graph, but for the stem's."""
    return [found.name for node in site_graph(model).graph.nodes if (found := activation_of(node)) is not None][1:]


@pytest.mark.parametrize(("name", "activation"), [*((n, "silu") for n in SILU), *((n, "hardswish") for n in HARDSWISH)])
def test_what_is_an_activation(name: str, activation: str) -> None:
    torch.manual_seed(0)
    model = _Net((SILU if activation == "silu" else HARDSWISH)[name]).double()
    assert _activations(model) == [activation]
    rewritten = assert_same_training(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert bnrestructure.explain(rewritten).counts["fused"] == 2


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none(name: str) -> None:
    torch.manual_seed(0)
    model = _Net(OTHERS[name]).double()
    assert not {"silu", "hardswish"} & set(_activations(model))
    assert_same_training(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))


def test_of_what_is_no_batch_norms_the_model_keeps_its_own_operations() -> None:
    model = _Net(lambda m, x: (x + 1) * torch.sigmoid(x + 1)).double()
    assert not _activations(model)
