"""What hands its input through, dropouts of nothing among them, stands between no two layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_training, assert_same_values, restructured_copy, training_step
from stems import stem
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


class _Net(nn.Module):
    """Something between a batch norm's activation and the convolution behind it."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.bn, self.last, self.between = stem(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), between
        self.none, self.in_place, self.images = nn.Dropout(0.0), nn.Dropout(0, inplace=True), nn.Dropout2d(0.0)
        self.alpha, self.identity, self.some, self.hooked = nn.AlphaDropout(0.0), nn.Identity(), nn.Dropout(0.5), nn.Dropout(0.0)
        self.off = nn.Dropout(0.5).eval()
        self.hooked.register_forward_hook(lambda m, given, result: result * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.bn(self.stem(x)).relu()))


IDENTITIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nn.Identity": lambda m, y: m.identity(y),
    "a dropout of nothing": lambda m, y: m.none(y),
    "in place": lambda m, y: m.in_place(y),
    "of channels": lambda m, y: m.images(y),
    "alpha": lambda m, y: m.alpha(y),
    "one that is off": lambda m, y: m.off(y),
    "a function": lambda m, y: F.dropout(y, 0.0, m.training),
    "a function that is off": lambda m, y: F.dropout(y, p=0.5, training=not m.training),
    "a function in place": lambda m, y: F.dropout(y, p=0.0, inplace=True),
    "a function of channels": lambda m, y: F.dropout2d(y, p=0.0),
    "torch.dropout": lambda m, y: torch.dropout(y, 0.5, train=False),
    "alpha that is off by default": lambda m, y: F.alpha_dropout(y, 0.5),
    "several": lambda m, y: m.none(m.identity(m.none(y))),
}
#: Which change something, or are watched.
OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a dropout": lambda m, y: m.some(y),
    "a function": lambda m, y: F.dropout(y, 0.5, m.training),
    "torch.dropout": lambda m, y: torch.dropout(y, 0.5, True),
    "alpha": lambda m, y: F.alpha_dropout(y, 0.5, True),
    "a hook": lambda m, y: m.hooked(y),
}


def _x() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_hands_its_input_through(name: str) -> None:
    rewritten = assert_same_training(_Net(IDENTITIES[name]).double(), _x())
    assert bnrestructure.explain(rewritten).counts["fused"] == 2


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not(name: str) -> None:
    rewritten = assert_same_training(_Net(OTHERS[name]).double(), _x())
    assert bnrestructure.explain(rewritten).counts["partial"] == 1


def test_a_rate_that_is_raised_between_two_steps() -> None:
    model = _Net(IDENTITIES["a dropout of nothing"]).double()
    rewritten = restructured_copy(model)
    for rate, fused in ((0.0, 2), (0.5, 1), (0.0, 2)):
        for m in (model, rewritten):
            m.none.p = rate
        x = _x()
        assert_same_values(training_step(rewritten, x), training_step(model, x))
        assert bnrestructure.explain(rewritten).counts["fused"] == fused
