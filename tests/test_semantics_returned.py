"""What a forward returns and reads on is one tensor: hooks on it, retain_grad() and torch.autograd.grad() see all of its gradient."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from equivalence import FP64_TOLERANCE, assert_same_training, cotangent_loss, restructured_copy, tree_tensors
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

import bnrestructure


class Pyramid(nn.Module):
    """A backbone that returns what each of its stages makes, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.first, self.second = BasicBlock(8, 8), BasicBlock(8, 16, 2, shortcut)
        self.third = nn.Sequential(Bottleneck(16, 4), Bottleneck(16, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {"stem": self.stem(x)}
        for name in ("first", "second", "third"):
            x = found[name] = self.get_submodule(name)(found["stem"] if name == "first" else x)
        return found


class EachStep(nn.Module):
    """Returns what a convolution, a batch norm and an activation make, beside what comes of them, and its input."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation()
        self.conv2, self.bn2, self.conv3 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.conv1(x)
        z = self.bn1(y)
        a = self.act(z)
        pooled = nn.functional.max_pool2d(a, 2)
        return self.conv3(self.bn2(self.conv2(a)).relu()), [y, z, (a, a)], pooled, x, pooled.mean((2, 3))


class DenseFeatures(nn.Module):
    """A dense block whose concatenation is returned, and read by a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = _DenseBlock(3, 8, 2, 4, 0.0, False)
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 8, 1), nn.AvgPool2d(2), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stem = self.stem(x)
        features = self.block(stem)
        return stem, features, self.transition(features)


class DenseReturned(nn.Module):
    """A dense block whose last concatenation nobody but the caller reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.block = _DenseBlock(3, 8, 2, 4, 0.0, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class Aliases(nn.Module):
    """Returns tensors that are, in eager, the very ones that the rest reads, by calls that do nothing; and slices of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.identity = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Identity()
        self.conv2, self.bn2, self.conv3 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.bn1(self.conv1(x))
        z = self.bn2(self.conv2(y.relu()))
        same = [y.contiguous(), y.to(torch.float64), self.identity(y), nn.functional.dropout(y, training=False), y.type_as(x)]
        return [self.conv3(z.relu()), *same, z, z[:, :2], z[0], x[:, 0]]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pyramid": Pyramid,
    "each step": EachStep,
    "each step, in place": lambda: EachStep(lambda: nn.ReLU(inplace=True)),
    "each step, silu": lambda: EachStep(nn.SiLU),
    "dense features": DenseFeatures,
    "dense, read by the caller alone": DenseReturned,
    "aliases": Aliases,
}


def _example(channels_last: bool = False) -> Tensor:
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double().train()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_returned_has_all_of_its_gradient(name: str, channels_last: bool) -> None:
    assert_same_training(_built(name), _example(channels_last), steps=2)  # it asks what is returned to retain its gradient


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_a_hook_that_changes_the_gradient_changes_what_flows_on(name: str, backend: str) -> None:
    gradients = []
    model = _built(name)
    for m in (model, restructured_copy(model, backend=backend)):
        outputs = m(_example().requires_grad_())
        for tensor in tree_tensors(outputs):
            if not tensor.is_leaf:
                tensor.register_hook(lambda g: g * 0.5)
        cotangent_loss(outputs).backward()
        gradients.append([p.grad for p in m.parameters()])
    for actual, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=FP64_TOLERANCE, atol=1e-11)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_caller_may_change_a_dense_blocks_features_in_place(backend: str, channels_last: bool) -> None:
    gradients = []
    model = _built("dense, read by the caller alone")
    for m in (model, restructured_copy(model, backend=backend)):
        cotangent_loss(m(_example(channels_last)).mul_(0.5).relu_()).backward()
        gradients.append([p.grad for p in m.parameters()])
    for actual, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=FP64_TOLERANCE, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in MODELS if "alone" not in name])
def test_the_gradient_of_the_last_output_by_the_others(name: str) -> None:
    gradients = []
    model = _built(name)
    for m in (model, restructured_copy(model)):
        tensors = [t for t in tree_tensors(m(_example())) if not t.is_leaf]
        last = tensors[0] if name.startswith("each") else tensors[-1]
        gradients.append(torch.autograd.grad(cotangent_loss(last), [t for t in tensors if t is not last], allow_unused=True))
    assert any(g is not None for g in gradients[0])
    for actual, expected in zip(*gradients[::-1], strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=FP64_TOLERANCE, atol=1e-11)


@pytest.mark.parametrize("channels_last", [False, True])
def test_returned_slices_are_views_as_in_eager(channels_last: bool) -> None:
    model, x = _built("aliases"), _example(channels_last)
    eager, ours = model(x), restructured_copy(model)(x)
    assert [t.stride() for t in ours] == [t.stride() for t in eager]
    *_, z, two, one, channel = ours
    assert [t is ours[2] for t in ours] == [t is eager[2] for t in eager]
    two.data.zero_()
    one.data.fill_(3)
    assert (z[1:, :2] == 0).all()
    assert (z[0] == 3).all()
    channel.fill_(5)
    assert (x[:, 0] == 5).all()


class Reversed(torch.autograd.Function):
    """Hands back the tensor that it is given: it is not the same tensor, for it has another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class ReturnsReversed(EachStep):
    def forward(self, x: Tensor) -> Any:
        y = self.bn1(self.conv1(x)).relu()
        return self.conv3(self.bn2(self.conv2(y)).relu()), Reversed.apply(y), y.contiguous()


def test_a_custom_function_that_hands_its_input_back_is_not_taken_for_it() -> None:
    torch.manual_seed(0)
    rewritten = assert_same_training(ReturnsReversed().double().train(), _example(), steps=2)
    assert bnrestructure.explain(rewritten).counts["fused"] == 1


class Pair(NamedTuple):
    first: Any
    second: Any


class Couple(Pair):
    """A class of a named tuple's."""


class Named(dict[str, Any]):
    pass


class Ordered(OrderedDict[str, Any]):
    pass


class Several(list[Any]):
    pass


class Both(tuple[Any, ...]):
    pass


@dataclass
class Record:
    inside: Any


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "a named tuple in a dict": lambda y: {"pair": Pair(y, y.mean())},
    "a named tuple in a dataclass": lambda y: Record(Pair(y, [y])),
    "a named tuple in a named tuple": lambda y: Pair(y, Pair(y.relu(), None)),
    "a class of a named tuple's": lambda y: {"couple": Couple(y, y.mean())},
    "a kind of dict": lambda y: Named(a=y, b=[y.mean(), 2]),
    "a kind of OrderedDict, in a list": lambda y: [Ordered(a=y)],
    "a kind of list, with a kind of tuple": lambda y: Several([y, Both((y.relu(), Named(c=y)))]),
    "sizes": lambda y: {"shape": y.shape, "of": Both((y, y.shape))},
}


class Returns(nn.Module):
    def __init__(self, container: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.container = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), container

    def forward(self, x: Tensor) -> Any:
        return self.container(self.bn(self.conv(x)))


def _kinds(value: Any) -> Any:
    if isinstance(value, Record):
        return Record, _kinds(value.inside)
    if isinstance(value, dict):
        return type(value), [(key, _kinds(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [_kinds(item) for item in value]
    return type(value)


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_are_of_their_kind(container: str) -> None:
    torch.manual_seed(0)
    model = Returns(CONTAINERS[container]).double().train()
    rewritten = restructured_copy(model)
    for _ in range(2):
        assert _kinds(rewritten(_example())) == _kinds(model(_example()))
    assert all(site.ran for site in bnrestructure.explain(rewritten).sites)


@pytest.mark.parametrize("name", ["pyramid", "aliases"])
def test_under_dynamo(name: str) -> None:
    gradients = []
    model = _built(name)
    for m in (model, torch.compile(copy.deepcopy(model), backend="bnrestructure")):
        returned = m(_example())
        tree_tensors(returned)[1].register_hook(lambda g: g * 2)
        cotangent_loss(returned).backward()
        gradients.append([p.grad for p in m.parameters()])
    for actual, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=FP64_TOLERANCE, atol=1e-11)


def test_the_rest_of_a_backbone_is_fused() -> None:
    plan = bnrestructure.explain(bnrestructure.restructure(_built("pyramid"), backend="reference"))
    statuses = {site.name: site for site in plan.sites}
    assert plan.counts["kept"] == 0
    assert statuses["third.0.bn1"].status == statuses["third.1.bn3"].status == "fused"
    assert "the caller and the layers behind it" in (statuses["stem.1"].reason or "")
