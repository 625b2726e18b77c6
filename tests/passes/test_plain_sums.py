"""Sums without a batch norm before them: pre-activation blocks, and what a squeeze-excite is added to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.graph.ir import BatchNorm, OwnGradient, Residual, Statistics
from bnrestructure.passes.pipeline import PASSES


class _Net(nn.Module):
    """Two convolutions of a stem's result; ``body`` adds what it likes."""

    def __init__(self, body: Callable[[_Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(3))
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        return self.body(self, x, y)


def _twice(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    s = x + m.conv2(F.relu(m.bn2(y)))
    return m.conv3(F.relu(m.bn3(s))) + s


#: Sums whose statistics ride on them, or whose ReLU does.
FUSED: dict[str, Callable[[_Net, Tensor, Tensor], Tensor]] = {
    "statistics": lambda m, x, y: m.conv2(F.relu(m.bn2(y + x))),
    "statistics, the shortcut first": lambda m, x, y: m.conv2(F.relu(m.bn2(x + y))),
    "statistics, and another block": _twice,
    "relu": lambda m, x, y: m.conv2(F.relu(x + y)) + F.relu(x),
    "relu, and two readers": lambda m, x, y: (lambda z: m.conv2(z) + m.conv3(z) + z)(F.relu(x + y)),
    "relu, and a batch norm": lambda m, x, y: m.conv2(m.bn2(F.relu(x + y))),
    "two convolutions": lambda m, x, y: m.conv3(m.bn2(m.conv2(x.tanh()) + y)),
    "a product": lambda m, x, y: m.conv2(m.bn2(x + m.scale * y.sigmoid())),
    "a sum of sums": lambda m, x, y: m.conv2(m.bn2(F.relu(m.bn3(y) + x) + x)),
}
#: Those that are left: nothing rides on them, or others get the gradient too.
LEFT: dict[str, Callable[[_Net, Tensor, Tensor], Tensor]] = {
    "nothing behind": lambda m, x, y: m.conv2(x + y),
    "another activation": lambda m, x, y: m.conv2(F.silu(x + y)) + F.silu(y),
    "read by others": lambda m, x, y: m.conv2(m.bn2(x.tanh() + y)) + y,
    "a view": lambda m, x, y: m.conv2(m.bn2(x.tanh() + y.flatten(2).view_as(x))),
    "itself": lambda m, x, y: m.conv2(m.bn2(y + y)),
    "one that broadcasts": lambda m, x, y: m.conv2(m.bn2(y + m.scale)),
}


@pytest.mark.parametrize("body", FUSED)
def test_statistics_and_relu_ride_on_the_sum(body: str) -> None:
    model = _Net(FUSED[body]).double()
    graph = after(model, "fission", "share-statistics", "fuse-statistics", "fuse-normalise", "fuse-residual").graph
    assert any(residual.mean is None for residual in Residual.every(graph))
    assert len(Statistics.every(graph)) == (1 if "batch norm" in body and "relu" not in body else 0)
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64))
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64), options={"backend": "auto"})


@pytest.mark.parametrize("body", LEFT)
def test_others_are_left(body: str) -> None:
    model = _Net(LEFT[body]).double()
    assert all(residual.mean is not None for residual in Residual.every(after(model, *PASSES).graph))
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64))


def _made_late(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    read = m.bn3(m.conv2(y))
    return torch.stack([m.bn2(m.conv3(x.detach().tanh()) + y), read])


def _made_early(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    """The branch is computed before the links, so that autograd comes to it after them."""
    branch = m.conv3(x.tanh())
    read = m.bn3(m.conv2(y))
    return torch.stack([m.bn2(branch + y), read])


def _activated(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    z = F.relu(m.bn2(y))
    shortcut = m.conv2(z)
    read = m.bn3(m.conv3(shortcut))
    return torch.stack([F.relu(shortcut + z), read])


@pytest.mark.parametrize("body", [_made_late, _made_early, _activated])
def test_links_write_to_no_gradient_that_the_other_operand_has_yet_to_read(body: Callable[[_Net, Tensor, Tensor], Tensor]) -> None:
    """The producer of y is no part of the links' past: its backward may come after theirs, which write to the shortcut's gradient."""
    model = _Net(body).double()
    graph = after(model, *PASSES).graph
    (plain,) = [residual for residual in Residual.every(graph) if residual.mean is None]
    assert OwnGradient.of(plain.r) is not None
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64))


def test_a_batch_norm_left_whole_hands_its_gradient_to_nobody() -> None:
    """select-kernels puts its halves together, of which none rides on anything; the sum behind it stays one."""
    model = _Net(lambda m, x, y: m.conv2(m.bn2(F.relu(x + F.gelu(m.bn3(x.tanh())))))).double()
    graph = after(model, *PASSES).graph
    assert [BatchNorm.of(residual.y) is not None for residual in Residual.every(graph)] == [True]
    assert_same_training(model, torch.randn(4, 3, 9, 7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", ["statistics, and another block", "relu, and two readers"])
def test_on_the_cpu_kernels(body: str, dtype: torch.dtype) -> None:
    model = _Net(FUSED[body]).to(dtype).train()
    report = bnrestructure.verify(model, torch.randn(4, 3, 17, 13, dtype=dtype), dtype=dtype)
    assert report.ok, report


def test_backward_keeps_no_operand() -> None:
    """Of y + r with a ReLU the result alone is kept, as eager keeps it."""

    def kept_by(model: nn.Module) -> int:
        """Activations of 8 channels that a forward pass keeps for backward."""
        shapes: list[torch.Size] = []

        def keep(t: Tensor) -> Tensor:
            shapes.append(t.shape)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(torch.randn(4, 3, 9, 7))
        return shapes.count(torch.Size((4, 8, 9, 7)))

    model = bnrestructure.restructure(_Net(lambda m, x, y: F.relu(m.scale * y + x)).train(), backend="reference")
    ours = kept_by(model)
    assert 0 < ours <= kept_by(bnrestructure.unrestructure(model))
