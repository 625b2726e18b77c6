"""What goes by a tensor's strides, or writes through an alias of it, sees eager's memory, whatever layout the kernels answer in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_training, cotangent_loss, restructured_copy
from needs import needs_kernels
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.ops.formats import eager_format


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


def _drawn(y: Tensor) -> Tensor:
    return y * torch.empty_like(y).uniform_()


#: On images [2, 4, 6, 6]; what they draw is in the order of memory.
STRIDED |= {
    "view by keyword": lambda y: y.view(size=(2, -1)),
    "view_as": lambda y: y.view_as(torch.empty(2, 4, 36)),
    "an operator's view": lambda y: torch.ops.aten.view(y, [2, -1]),
    "take_along_dim": lambda y: torch.take_along_dim(y, torch.arange(0, 288, 5), None),
    "kron": lambda y: torch.kron(y, torch.ones(1, 1, 2, 1)),
    "resize_": lambda y: y.detach().clone().resize_(4, 72) + y.reshape(4, 72),
    "resize_as_": lambda y: torch.empty(0).resize_as_(y.detach()).uniform_() + y,
    "dropout of an expanded tensor": lambda y: F.dropout(y.unsqueeze(1).expand(-1, 3, -1, -1, -1), 0.3),
    "native_dropout": lambda y: torch.native_dropout(y, 0.3, True)[0],
    "randint_like": lambda y: y * torch.randint_like(y, 5),
    "init": lambda y: y * nn.init.normal_(y.detach().clone()),
    "an operator's dropout": lambda y: torch.ops.aten.dropout(y, 0.3, True),
    "an operator's normal_": lambda y: y * torch.ops.aten.normal_(torch.empty_like(y)),
    "uniform_": _drawn,
    "an operator in place": lambda y: torch.ops.aten.mul_.Tensor(y.clone(), y),
    "a pool of volumes": lambda y: F.max_pool3d(y, (2, 1, 1)),
    "its layer": nn.MaxPool3d((2, 1, 1)),
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
        torch.manual_seed(1)
        out = m(x)
        cotangent_loss(out).backward()
        found.append((out.detach(), m.conv1.weight.grad, m.bn.weight.grad))
    assert bnrestructure.explain(rewritten).counts["fused"] == 1
    for actual, expected in zip(*found[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@needs_kernels
def test_a_custom_function_in_a_graph_of_dynamos() -> None:
    torch.manual_seed(0)
    model, x = GoesByStrides(STRIDED["a custom Function"]), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(copy.deepcopy(model), backend="bnrestructure", options={"backend": "cpu", "rest": "eager"}, fullgraph=True)
    for m in (model, compiled):
        m(x).square().sum().backward()
    torch.testing.assert_close(compiled.conv1.weight.grad, model.conv1.weight.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2), (0, 2, 3, 4, 1)])
def test_a_copy_in_eagers_format_is_no_view(order: tuple[int, ...]) -> None:
    shape = (2, 3, 4, 5, 6)[: len(order)]
    x = torch.randn(shape[::-1]).permute(*reversed(range(len(order)))).requires_grad_()
    copied = eager_format(x, order)
    assert isinstance(copied, Tensor)
    assert copied.permute(order).is_contiguous()
    assert not copied._is_view()
    torch.testing.assert_close(copied, x, rtol=0, atol=0)
    copied.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


@needs_kernels
def test_an_output_may_be_hooked_edited_and_detached_in_place() -> None:
    torch.manual_seed(0)
    model, x = GoesByStrides(lambda y: y), torch.randn(2, 3, 8, 8)
    fired = []
    for m in (model, restructured_copy(model, backend="cpu")):
        out = m(x)
        out.register_hook(lambda gradient: fired.append(gradient.sum()))
        out.mul_(2)
        out.sum().backward()
        m(x).detach_()
    assert len(fired) == 2


def test_a_custom_function_by_another_name_is_left_to_the_model_and_named() -> None:
    torch.manual_seed(0)
    model = GoesByStrides(Flattened.apply).double().train()
    rewritten = assert_same_training(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), steps=2)
    assert "custom autograd Function by another name" in str(bnrestructure.explain(rewritten))


class MeasuresWithoutGradients(GoesByStrides):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn(self.conv1(x)).relu())
        with torch.inference_mode():
            self.operation(y)
        return y


def test_inference_mode_is_not_taken_for_a_custom_function() -> None:
    rewritten = restructured_copy(MeasuresWithoutGradients(torch.mean).train())
    rewritten(torch.randn(2, 3, 8, 8))
    assert "turns gradients or autocast on or off" in str(bnrestructure.explain(rewritten))


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
