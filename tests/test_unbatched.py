"""Convolutions that are called without a batch dimension: a batch norm's channels are then another dimension than theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from equivalence import assert_same_training, relative_errors, restructured_copy, training_step
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


class Chain(nn.Module):
    """conv-bn-act-conv of one image, its rows the batch norm's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm1d(6), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.bn(self.conv(x))))


class Signal(Chain):
    """The same of a signal, its positions the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(6), nn.Conv1d(8, 4, 1)


class Residual(nn.Module):
    """A join of two batch norms and a shortcut with readers of its own, and a bare activation in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm1d(6)
        self.conv, self.bn1 = nn.Conv2d(8, 8, 1), nn.BatchNorm1d(6)
        self.down, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm1d(6)
        self.left, self.right = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn0(self.stem(x)))
        x = F.relu(self.bn1(self.conv(x)) + self.bn2(self.down(x)))
        return self.left(x) + self.right(F.relu(x - 1))


MODELS = {"chain": (Chain, (3, 6, 7)), "signal": (Signal, (3, 6)), "residual": (Residual, (3, 6, 7))}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_equals_eager(name: str) -> None:
    made, shape = MODELS[name]
    torch.manual_seed(0)
    model = made().double().train()
    assert_same_training(model, torch.randn(shape, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", MODELS)
def test_autocast_makes_the_dtypes_that_eager_makes(name: str) -> None:
    made, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = made().train(), torch.randn(shape)
    rewritten = bnrestructure.restructure(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(x), rewritten(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_a_model_takes_one_image_and_a_batch_in_turn() -> None:
    """Eight channels of eight pixels: its batch norm is of the channels of a batch, and of the pixels of one image."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.between, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.between(F.relu(self.conv(x))).flatten(-2)))

    torch.manual_seed(0)
    model = Either().double().train()
    rewritten = restructured_copy(model)
    for shape in ((5, 3, 4, 6), (3, 4, 6), (5, 3, 4, 6)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected, got = training_step(model, x), training_step(rewritten, x)
        assert max(relative_errors(got, expected).values()) < 1e-9


def test_the_plan_says_so() -> None:
    plan = bnrestructure.explain(Chain().train(), torch.randn(3, 6, 7))
    assert {(k.forward, k.forward_reason) for k in plan.kernels} == {("reference", "no batch dimension: PyTorch's convolution")}
