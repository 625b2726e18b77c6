"""``0 + x``, with which Python's ``sum`` begins: of a batch norm's result it is that result."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after, site_graph
from torch import Tensor, fx, nn

from bnrestructure.graph.ir import Normalise
from bnrestructure.passes.pipeline import PASSES


class _Branches(nn.Module):
    """RepVGG's and MobileOne's: the sum of several conv-bn branches and of a batch norm alone."""

    def __init__(self, total: Callable[[_Branches, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, k, padding=k // 2, bias=False), nn.BatchNorm2d(6)) for k in (1, 3, 5))
        self.identity = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 2, 1)
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.total(self, self.stem(x))))


def _loop(m: _Branches, x: Tensor) -> Tensor:
    out = 0
    for branch in m.branches:
        out = out + branch(x)
    return out


def _in_place(m: _Branches, x: Tensor) -> Tensor:
    out = 0 + m.identity(x)
    for branch in m.branches:
        out += branch(x)
    return out


def _sums(graph: fx.Graph) -> list[fx.Node]:
    """The sums of a prepared graph, and the differences."""
    return [node for node in graph.nodes if node.target in (operator.add, torch.add, operator.sub)]


SUMS: dict[str, Callable[[_Branches, Tensor], Tensor]] = {
    "sum": lambda m, x: sum(branch(x) for branch in m.branches),
    "a loop": _loop,
    "in place": _in_place,
    "a float on the right": lambda m, x: m.branches[0](x) + 0.0 + m.branches[1](x) + m.branches[2](x),
    "torch.add": lambda m, x: torch.add(m.branches[0](x), 0) + m.branches[1](x) + m.branches[2](x),
}


@pytest.mark.parametrize("total", SUMS)
def test_every_branch_rides_on_a_join(total: str) -> None:
    model = _Branches(SUMS[total]).double()
    graph = after(model, *PASSES).graph
    assert not Normalise.every(graph)
    assert not _sums(graph)
    assert_same_training(model, torch.randn(4, 3, 8, 9, dtype=torch.float64))


KEPT: dict[str, Callable[[_Branches, Tensor], Tensor]] = {
    "another number": lambda m, x: m.branches[0](x) + 1,
    "a weight": lambda m, x: torch.add(m.branches[0](x), 0, alpha=2),
    "others read it": lambda m, x: torch.cat([y := m.branches[0](x), y + 0], 1)[:, :6],
    "others change it": lambda m, x: torch.cat([y := m.branches[0](x), (y + 0).tanh_()], 1)[:, :6],
    "whole numbers": lambda m, x: m.branches[0](x) * ((x > 0).long() + 0.0).mean(),
    "what is no batch norm's": lambda m, x: torch.relu(x) + 0,
    "a difference": lambda m, x: 0 - m.branches[0](x),
}


@pytest.mark.parametrize("total", KEPT)
def test_a_sum_that_is_more_stays(total: str) -> None:
    model = _Branches(KEPT[total]).double()
    assert len(_sums(site_graph(model).graph)) == 1
    assert_same_training(model, torch.randn(4, 3, 8, 9, dtype=torch.float64))


def test_the_caller_gets_a_tensor_of_its_own() -> None:
    """What is returned beside the sum is another tensor: an edit of one leaves the other alone."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.bn(self.conv(x))
            return y, y + 0

    assert len(_sums(site_graph(Both()).graph)) == 1
