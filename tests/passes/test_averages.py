"""A global average is one however it is spelt: as the end of a network, and as the squeeze of squeeze-excite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after
from torch import Tensor, nn
from torch.nn import functional as F

from bnrestructure.graph.ir import Normalise, Squeeze
from bnrestructure.passes.pipeline import PASSES

KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "method": lambda x: x.mean((2, 3), keepdim=True),
    "method, a list": lambda x: x.mean(dim=[2, 3], keepdim=True),
    "method, by NumPy's name": lambda x: x.mean(axis=(2, 3), keepdim=True),
    "function": lambda x: torch.mean(x, (-1, -2), keepdim=True),
    "function, by name": lambda x: torch.mean(input=x, dim=(3, -2), keepdim=True),
}
DROPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.mean((2, 3)),
    "method, a list": lambda x: x.mean([-2, -1], False),
    "function": lambda x: torch.mean(x, dim=(2, 3)),
}


class _Gated(nn.Module):
    def __init__(self, average: Callable[[Tensor], Tensor], functional: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.fc2, self.conv2 = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)
        self.average, self.functional = average, functional

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, training=True) if self.functional else self.bn(x)
        x = F.silu(x)
        gate = self.fc2(F.relu(self.fc1(self.average(x)))).sigmoid()
        return self.conv2(x * gate)


class _Head(nn.Module):
    def __init__(self, average: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.average(F.relu(self.bn(self.conv(x)))))


def _squeezes(model: nn.Module) -> int:
    graph = after(model, *PASSES).graph
    assert not Normalise.every(graph)
    return len(Squeeze.every(graph))


@pytest.mark.parametrize("functional", [False, True], ids=["module", "F.batch_norm"])
@pytest.mark.parametrize("spelling", KEEPING)
def test_squeeze_excite(spelling: str, functional: bool) -> None:
    model = _Gated(KEEPING[spelling], functional).double()
    assert _squeezes(model) == 1
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64))


@pytest.mark.parametrize("spelling", DROPPING)
def test_head(spelling: str) -> None:
    model = _Head(DROPPING[spelling]).double()
    assert _squeezes(model) == 1
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64))


class _Sized(nn.Module):
    """What is between reads nothing but the size of the normalised tensor."""

    def __init__(self, size: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv1(x), None, None, self.bn.weight, self.bn.bias, training=True)
        return self.conv2(self.size(x))


@pytest.mark.parametrize(
    "size",
    [
        lambda z: z / z.size(0),
        lambda z: F.relu(z) * 2.0 ** -z.dim(),
        lambda z: (lambda a: a.view(a.shape[0], a.shape[1], -1).view(a.shape))(F.relu(z)),
        lambda z: z.new_ones(z.shape) * F.silu(z) / z.numel(),
    ],
    ids=["size", "dim", "shape", "numel"],
)
def test_sizes_are_right_wherever_they_are_read(size: Callable[[Tensor], Tensor]) -> None:
    model = _Sized(size).double()
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64))
    assert_same_training(model, torch.randn(3, 3, 6, 8, dtype=torch.float64))


def test_no_tensor_is_in_memory_for_its_size_alone() -> None:
    class Net(_Sized):
        def forward(self, x: Tensor) -> Tensor:
            z = F.relu(F.batch_norm(self.conv1(x), None, None, self.bn.weight, self.bn.bias, training=True))
            return self.conv2(z) / (z.shape[2] * z.shape[3])

    model = Net(lambda z: z).double()
    assert not Normalise.every(after(model, *PASSES).graph)
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64))
