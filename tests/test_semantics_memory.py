"""What others get of a graph: concats whole or in part, edits in place by unfollowed code, hooks; and segments that are not alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import FP64_TOLERANCE, assert_same_training, cotangent_loss, restructured_copy, training_step, tree_tensors
from test_semantics_tracing import _Base, _double
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.densenet import _DenseBlock

import bnrestructure


def _images(channels_last: bool = True, size: int = 6) -> Tensor:
    x = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Reads(nn.Module):
    """Reads a value, and hands its input on."""

    def forward(self, y: Tensor) -> Tensor:
        return y if y.sum().item() == y.sum().item() else -y


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


class Dense(nn.Module):
    """A dense block, and what is done with its last concat."""

    def __init__(self, head: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = _DenseBlock(3, 8, 2, 4, 0.0, False)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.block(self.stem(x)))


#: What leaves shares eager's concat, which none of the block's own layers has kept.
HEADS: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda c: c[:, 2:9],
    "narrow": lambda c: c.narrow(1, 2, 7),
    "one channel": lambda c: c[:, 3],
    "permute": lambda c: c.permute(0, 2, 3, 1),
    "flatten": lambda c: c.flatten(1),
    "detached, and more": lambda c: (c.detach(), c.exp().mean((2, 3))),
    "channels last": lambda c: c.contiguous(memory_format=torch.channels_last),
    "a hooked identity": _hooked(nn.Identity()),
    "a hooked dropout": _hooked(nn.Dropout(0.0)),
    "a part that reads values": Reads(),
}


@pytest.mark.parametrize("edit", ["detached", "in place"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_who_gets_a_concat_may_edit_it(name: str, channels_last: bool, edit: str) -> None:
    x = _images(channels_last, 1 if name == "flatten" else 6)
    model = _double(Dense(HEADS[name]))
    gradients = []
    for m in (model, restructured_copy(model)):
        first, *others = tree_tensors(m(x))
        loss = cotangent_loss(others) if others else cotangent_loss(first)
        first.detach().mul_(2) if edit == "detached" or not first.requires_grad else first.mul_(2)
        loss.backward()
        gradients.append([p.grad for p in m.parameters()])
    for actual, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=FP64_TOLERANCE, atol=1e-11)


def test_a_dense_block_that_stays_inside_is_one_buffer() -> None:
    head = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 4, 1))
    plan = bnrestructure.explain(bnrestructure.restructure(_double(Dense(head))))
    assert plan.counts["fused"] == len(plan.sites)


class Clips(nn.Module):
    """A part that reads values, and changes what it is given in place."""

    def forward(self, y: Tensor) -> Tensor:
        if y.detach().abs().max().item() > 1e-6:
            y.mul_(0.5)
        return y.mean()


class EditsBefore(_Base):
    def __init__(self, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.edit = edit

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        edited = self.edit(y)
        return self.bn2(self.conv2(F.relu(self.bn1(y)))) + edited.mean()


@pytest.mark.parametrize("edit", [Clips(), Doubled.apply, _hooked(nn.ReLU(inplace=True))], ids=["a part", "a Function", "a hooked layer"])
def test_edits_that_no_name_tells_of(edit: Any) -> None:
    model = _double(EditsBefore(edit))
    assert_same_training(model, _images())
    rewritten = restructured_copy(model)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(_images()), model(_images()))
    torch.testing.assert_close(rewritten.bn1.running_mean, model.bn1.running_mean)


class Heads(nn.Module):
    """Two readers of one tensor, both returned."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.a, self.b = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.first = first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x)
        return (F.max_pool2d(y, 2) if self.first == "pool" else self.a(y)), self.b(y)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("first", ["pool", "convolution"])
def test_a_hook_on_what_the_loss_leaves_out_is_not_called(first: str, channels_last: bool) -> None:
    called: list[Any] = []
    left_out, used = restructured_copy(_double(Heads(first)))(_images(channels_last))
    left_out.register_hook(called.append)
    used.register_hook(called.append)
    used.square().sum().backward()
    assert [type(gradient) for gradient in called] == [Tensor]


class Joined(nn.Module):
    """A concat of a convolution's result and ``other`` of the input, and two layers that read it."""

    def __init__(self, channels: int, other: Callable[[Tensor], Tensor], last: bool = True) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(channels), nn.Conv2d(channels, 4, 1)
        self.other, self.last = other, last

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.conv(x), self.other(x)]
        return self.out(F.relu(self.bn(torch.cat(parts if self.last else parts[::-1], 1))))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "other"),
    [(4, lambda x: torch.tensor([])), (4, lambda x: x[:, :0]), (7, lambda x: x > 0), (7, lambda x: x.float())],
    ids=["nothing", "no channels", "booleans", "narrower"],
)
def test_segments_that_are_not_alike(channels: int, other: Callable[[Tensor], Tensor], last: bool) -> None:
    assert_same_training(_double(Joined(channels, other, last)), _images())


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.single, self.double_ = nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.single(self.stem(x)), self.double_(x.double())], 1)


def test_a_concat_of_two_dtypes_is_promoted() -> None:
    torch.manual_seed(0)
    model = Wider()
    x = torch.randn(2, 3, 6, 6)
    expected, actual = training_step(model, x), training_step(restructured_copy(model), x)
    assert actual["output/0"].dtype == expected["output/0"].dtype == torch.float64
    torch.testing.assert_close(actual["output/0"][:, 4:], expected["output/0"][:, 4:])


def test_under_autocast_a_concat_keeps_its_input() -> None:
    torch.manual_seed(0)
    block, x = _DenseBlock(3, 8, 2, 4, 0.0, False).train(), torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = block(x), restructured_copy(block)(x)
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual[:, :8], x)


class Unbatched(nn.Module):
    """1-D convolutions of tensors without a batch dimension, whose first one is channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.bn, self.bn2 = nn.BatchNorm1d(7), nn.BatchNorm1d(14)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(torch.cat([self.a(x), self.b(F.relu(self.bn(x)))], 1))


def test_a_concat_along_the_length() -> None:
    assert_same_training(_double(Unbatched()), torch.randn(3, 7, dtype=torch.float64))
