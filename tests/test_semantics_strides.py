"""What goes by a tensor's strides, or writes through an alias of it, sees eager's memory, whatever layout the kernels answer in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_training, cotangent_loss, restructured_copy
from needs import needs_kernels
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


class Flattened(torch.autograd.Function):
    """Asks for tensors that can be viewed, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.view(x.shape[0], -1) * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view(ctx.shape) * 2


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "as_strided": lambda y: torch.as_strided(y, (2, 4), (144, 36)),
    "the method": lambda y: y.as_strided((2, 3, 4), (144, 1, 36)),
    "a custom Function": lambda y: Flattened.apply(y),
    "view_as_complex": lambda y: torch.view_as_complex(y.reshape(2, 4, 18, 2)).abs(),
    "a view in another dtype": lambda y: y * (y.detach().view(torch.int16)[..., 1::2] < 0),  # the sign, in the upper half
}


class GoesByStrides(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2, self.operation = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.conv2(self.bn(self.conv1(x)).relu()))


@needs_kernels
@pytest.mark.parametrize("name", STRIDED)
def test_operations_that_go_by_strides(name: str) -> None:
    torch.manual_seed(0)
    model, x = GoesByStrides(STRIDED[name]), torch.randn(2, 3, 8, 8)
    found = []
    rewritten = restructured_copy(model, backend="cpu")
    for m in (model, rewritten):
        out = m(x)
        cotangent_loss(out).backward()
        found.append((out.detach(), m.conv1.weight.grad, m.bn.weight.grad))
    assert bnrestructure.explain(rewritten).counts["fused"] == 1
    for actual, expected in zip(*found[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_a_custom_function_by_another_name_is_left_to_the_model_and_named() -> None:
    torch.manual_seed(0)
    model = GoesByStrides(Flattened.apply).double().train()
    rewritten = assert_same_training(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), steps=2)
    assert "custom autograd Function by another name" in str(bnrestructure.explain(rewritten))


#: Each hands back the very tensor that it is given.
HANDED_THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "to": lambda y: y.to(torch.float64),
    "cpu": Tensor.cpu,
    "Identity": nn.Identity(),
    "dropout of nothing": lambda y: F.dropout(y, training=False),
    "positive": torch.positive,
}


class WritesThroughAlias(nn.Module):
    """Masks some channels by a slice of what is the tensor itself."""

    def __init__(self, same: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2, self.same = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), same

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv1(x))
        self.same(y)[:, :2].mul_(0)
        out: Tensor = self.conv2(y)
        return out


@pytest.mark.parametrize("name", HANDED_THROUGH)
def test_a_write_through_an_alias_shows_in_the_tensor(name: str) -> None:
    torch.manual_seed(0)
    model = WritesThroughAlias(HANDED_THROUGH[name]).double().train()
    assert_same_training(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), steps=2)
