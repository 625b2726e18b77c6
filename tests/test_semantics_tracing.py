"""What tracing would silently freeze or lose: each trap trains as eager does, step after step, whether rewritten or left alone."""

from __future__ import annotations

import random
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from equivalence import assert_same_training, assert_same_values, restructured_copy, training_step
from small_models import conv_bn
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bnrestructure


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class TorchRandom(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) * torch.rand(6, 1, 1, dtype=torch.float64)


class PythonRandom(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) * random.random()


class NumpyRandom(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) * float(np.random.rand())


class RandomInside(_Base):
    """Only a submodule draws: the rest is still rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = TorchRandom()
        self.squash = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.squash(F.relu(self.trunk(x))))


class Dropouts(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.4)
        self.rate = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(self.trunk(x)), self.rate, self.training)


class Counter(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.trunk(x) * self.calls


class CounterBuffer(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.trunk(x) * self.calls


class BufferMethod(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        self.average.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return y * self.average.view(1, -1, 1, 1).clone()


class History(_Base):
    """A list that grows in forward()."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        self.history.append(y.detach().mean())
        return y * len(self.history)


class Replaced(_Base):
    """A dict whose one entry is replaced: its length never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, Any] = {"mean": torch.zeros(())}

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        previous = self.last["mean"]
        self.last["mean"] = y.detach().mean()
        return y + previous


class CountsInAnObject(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.state = SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.state.calls += 1
        return self.trunk(x) * self.state.calls


class AsksForTensor(_Base):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            x = [x]
        y = self.trunk(torch.cat(x, 1))
        return y * 2 if isinstance(y, torch.Tensor) else y


class NoGradInside(_Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(F.relu(y)))


class _Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv_bn(3, 6)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class NoGradDecorated(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = _Frozen()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(self.frozen(x))))


class EvalInside(_Base):
    """A batch norm switched to eval for one call and back: the flags look the same before and after."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn1.eval()
        y = self.bn1(self.conv1(x))
        self.bn1.train()
        return self.bn2(self.conv2(F.relu(y)))


class Detached(_Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(y)) + y.detach()


class Checkpointed(_Base):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return checkpoint(lambda t: self.bn2(self.conv2(t)), y, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class CheckpointedBlock(_Base):
    """A whole block under a checkpoint: the block itself is still a region, and is run twice as in eager."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv_bn(6, 6), conv_bn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.trunk(x), use_reentrant=False)


class ReadsRunningStatistics(_Base):
    def forward(self, x: Tensor) -> Tensor:
        before = self.bn1.running_mean.clone()
        y = self.trunk(x)
        return y + (self.bn1.running_mean - before).view(1, -1, 1, 1) + self.bn1.weight.sum()


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class NamedOutput(_Base):
    def forward(self, x: Tensor) -> Pair:
        y = F.relu(self.bn1(self.conv1(x)))
        return Pair(y, self.conv2(y))


class OrderedOutput(_Base):
    def forward(self, x: Tensor) -> OrderedDict[str, Any]:
        y = F.relu(self.bn1(self.conv1(x)))
        return OrderedDict(out=self.conv2(y), aux=[y, (self.bn2(y), None, 3)])


class ShapeArithmetic(_Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        n, c, h, w = y.shape
        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return F.interpolate(y, size=(h * 2, w + 1)) / (h * w)


class ShapeBranch(_Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        return y.flip(2) if y.shape[0] > 3 else y


class Loop(_Base):
    """The same block again and again: every call is a site of its own, the buffers are updated in order."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        for _ in range(3):
            y = y + self.block(F.relu(y))
        return y


TRAPS = [
    TorchRandom, PythonRandom, NumpyRandom, RandomInside, Dropouts, Counter, CounterBuffer, BufferMethod, History, Replaced,
    CountsInAnObject, AsksForTensor, NoGradInside, NoGradDecorated, EvalInside, Detached, Checkpointed, CheckpointedReentrant,
    CheckpointedBlock, ReadsRunningStatistics, NamedOutput, OrderedOutput, ShapeArithmetic, ShapeBranch, Loop,
]  # fmt: skip


def _double(model: nn.Module) -> nn.Module:
    return model.double().train()


@pytest.fixture(autouse=True)
def _numpy_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed, which training_step calls, seeds the other two generators as well."""
    seed = torch.manual_seed

    def seed_all(value: int) -> Any:
        random.seed(value)
        np.random.seed(value)
        return seed(value)

    monkeypatch.setattr(torch, "manual_seed", seed_all)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda m: m.__name__)
def test_trap(trap: type[nn.Module]) -> None:
    model, x = _double(trap()), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(model, x, steps=3)


@pytest.mark.parametrize("trap", [Counter, History, Replaced, CountsInAnObject, EvalInside], ids=lambda m: m.__name__)
def test_capture_leaves_plain_attributes_as_they_were(trap: type[nn.Module]) -> None:
    model = _double(trap())
    plan = bnrestructure.explain(model, backend="reference")
    assert plan.sites
    for name, value in trap().__dict__.items():
        if not name.startswith("_") and isinstance(value, int | list | dict | SimpleNamespace):
            assert getattr(model, name) == value


@pytest.mark.parametrize(
    ("trap", "kind"), [(NamedOutput, Pair), (OrderedOutput, OrderedDict)], ids=["namedtuple", "ordered dict"]
)
def test_containers_of_the_output_keep_their_type(trap: type[nn.Module], kind: type) -> None:
    out = restructured_copy(_double(trap()))(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert type(out) is kind


def test_autocast_inside_forward_keeps_its_dtypes() -> None:
    class Island(_Base):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            with torch.autocast("cpu", enabled=False):
                y = self.bn2(self.conv2(F.relu(self.bn1(y.float()))))
            return y

    model, x = Island(), torch.randn(4, 3, 8, 8)
    rewritten = restructured_copy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x), rewritten(x)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


class Arguments(_Base):
    def forward(
        self, xs: list[Tensor], mask: Tensor | None = None, *, scale: float = 1.0, extra: dict[str, Tensor] | None = None
    ) -> Tensor:
        y = self.trunk(xs[0] + xs[-1]) * scale
        if mask is not None:
            y = y * mask
        return y if extra is None else y + extra["bias"]


def test_optional_list_dict_and_constant_arguments() -> None:
    model, rewritten = _double(Arguments()), None
    rewritten = restructured_copy(model)
    x, mask = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.rand(8, 8, dtype=torch.float64)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        (([x],), {}), (([x, x * 2],), {}), (([x], mask), {}), (([x],), {"scale": 2.0}), (([x],), {"scale": 3.0}),
        (([x],), {"extra": {"bias": mask}}), (([x],), {"mask": mask, "scale": 0.5}), (([x], None), {}),
    ]  # fmt: skip
    for args, kwargs in calls * 2:
        assert_same_values(training_step(rewritten, *args, **kwargs), training_step(model, *args, **kwargs))


class AppendsToArgument(_Base):
    def forward(self, x: Tensor, collected: list[Tensor]) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        collected.append(y)
        return self.bn2(self.conv2(y))


def test_argument_that_forward_writes_to() -> None:
    model, x = restructured_copy(_double(AppendsToArgument())), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        collected: list[Tensor] = []
        model(x, collected)
        assert len(collected) == 1
        assert type(collected[0]) is Tensor


def test_graph_module_of_the_users_own() -> None:
    gm = fx.symbolic_trace(_double(Loop()))
    assert_same_training(gm, torch.randn(4, 3, 8, 8, dtype=torch.float64))


def test_users_own_trace_of_a_restructured_model() -> None:
    model, x = _double(Loop()), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    rewritten = restructured_copy(model)
    training_step(rewritten, x)
    traced = fx.symbolic_trace(restructured_copy(model))
    assert_same_values(training_step(traced, x), training_step(model, x))


def test_lazy_modules() -> None:
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(2, 1))
    rewritten = bnrestructure.restructure(lazy, backend="reference")
    x = torch.randn(4, 3, 8, 8)
    rewritten(x)
    rewritten.double()
    assert_same_training(bnrestructure.unrestructure(rewritten), x.double())
    assert bnrestructure.explain(rewritten, backend="reference").counts["fused"] == 1
