"""Forwards that decide by what their values are, call what is not PyTorch's own, or keep what they made: trained as eager trains them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from equivalence import assert_same_training, assert_same_values, restructured_copy, training_step, tree_tensors
from stems import built, stem
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


class TupleOrTensor(nn.Module):
    """Takes a recurrent layer's first result only where it is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.recurrent = stem(kind=nn.Conv1d, norm=nn.BatchNorm1d), nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.recurrent(self.stem(x).permute(2, 0, 1))
        return y[0] * 2 if isinstance(y, tuple) else y * 3


class TriesKeyword(nn.Module):
    """Calls each layer with an argument that most do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x


class _Swish(torch.autograd.Function):
    """A custom Function whose backward is not the derivative of its forward, so that looking into it would show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid() * 3


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.last = stem(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Swish.apply(self.norm(self.stem(x))))


class Chunks(nn.Module):
    """YOLO's C2f: the parts of a chunk, a list that grows, and a concat of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = stem(8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(2))
        self.last = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.stem(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.last(torch.cat(parts, 1))


class SplitAndUnbind(nn.Module):
    """Res2Net's groups, and iteration over a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = stem(8), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.stem(x), 4, 1)
        rows = [row * (i + 1) for i, row in enumerate(F.relu(self.norm(self.conv(first))))]
        return torch.stack(rows) + sum(second.unbind(1)).unsqueeze(1)  # type: ignore[union-attr]


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stem(), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))])

    def features(self, x: Tensor) -> Iterator[Tensor]:
        for stage in self.stages:
            x = stage(x)
            yield x

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"p{i}": feature for i, feature in enumerate(self.features(x))}


@dataclass(frozen=True)
class Output:
    features: Tensor
    extra: dict[str, Any]


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = stem(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Output:
        y = self.norm(self.stem(x))
        return Output(y, {"pooled": y.mean((2, 3)), "count": 2})


class AsksForKinds(nn.Module):
    """Branches on the number of dimensions, the dtype, the device, None and a container's length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = stem(), nn.BatchNorm2d(4)
        self.extra: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.dtype not in (torch.float64, torch.float32) or x.device.type == "meta" or not x.is_floating_point():
            raise ValueError("images, please")
        outputs = [self.stem(x)]
        if self.extra is not None:
            outputs.append(self.extra(x))
        return self.norm(outputs[0]) if len(outputs) == 1 and torch.is_tensor(outputs[0]) else outputs[1]


class BySize(nn.Module):
    """Pads to a multiple of four: a branch and numbers that follow from sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = stem(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[-1] % 4
        if missing:
            x = F.pad(x, (0, missing)) + 1.0  # which padding by nothing would not be
        y = self.norm(self.stem(x))
        n, c, h, w = y.shape
        return y.view(n, c // 2, 2, h, w).transpose(1, 2).reshape(n, -1, h * w)


class Tokens(nn.Module):
    """Dropout after a tensor became channels_last in the middle of the network: its mask follows the order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.last, self.drop = stem(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.stem(x)))
        y = y.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(y.shape)
        return self.drop(self.last(y))


class SqueezeExcitation(nn.Module):
    """Written by hand, with sizes read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.last = stem(8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.reduce, self.expand = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        n, c, _, _ = y.size()
        gate = self.expand(F.relu(self.reduce(y.mean((2, 3))))).sigmoid().view(n, c, 1, 1)
        return self.last(y * gate.expand_as(y))


class DropPath(nn.Module):
    """Stochastic depth by hand: random numbers of a shape that is computed, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = stem(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.norm(y)
        mask = z.new_empty((z.shape[0],) + (1,) * (z.ndim - 1)).bernoulli_(0.7)
        return y + z * mask.div_(0.7)


class NumbersOfItsOwn(nn.Module):
    """A batch norm whose momentum follows from the size of the batch, and whose eps is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("eps", torch.tensor(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.stem(x), self.mean, self.var, training=True, momentum=0.1 * x.shape[0], eps=self.eps)
        return self.last(F.relu(y))


class DenseSkip(nn.Module):
    """A dense block whose normalised result is a skip connection, and whose size a later layer goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.narrow = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(4 * n), nn.ReLU(), nn.Conv2d(4 * n, 8, 1)) for n in (1, 2)])
        self.grow = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)) for _ in range(2)])
        self.norm, self.last = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for narrow, grow in zip(self.narrow, self.grow, strict=True):
            features.append(grow(narrow(torch.cat(features, 1))))
        skip = F.relu(self.norm(torch.cat(features, 1)))
        deep = F.interpolate(F.max_pool2d(self.last(skip), 2), size=skip.shape[2:])
        return torch.cat([deep, skip], 1)


FORWARDS: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    (TupleOrTensor, (2, 3, 9)), (TriesKeyword, (2, 3, 12)), (CustomFunction, (2, 3, 6, 6)), (Chunks, (2, 3, 6, 6)),
    (SplitAndUnbind, (3, 3, 6, 6)), (Generator, (2, 3, 6, 6)), (DataclassOutput, (2, 3, 6, 6)), (AsksForKinds, (2, 3, 6, 6)),
    (BySize, (2, 3, 6, 6)), (Tokens, (2, 3, 8, 8)), (SqueezeExcitation, (2, 3, 6, 6)), (DropPath, (4, 3, 6, 6)),
    (NumbersOfItsOwn, (4, 3, 6, 6)), (DenseSkip, (2, 3, 6, 6)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shape"), FORWARDS, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_forward_runs_rewritten_and_trains_the_same(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    rewritten = assert_same_training(built(kind), torch.randn(shape, dtype=torch.float64), steps=3)
    plan = bnrestructure.explain(rewritten)
    assert plan.captures == {"the whole model": 1}
    assert all(site.ran for site in plan.sites)
    assert plan.counts["kept"] == 0


def _loss(output: Any) -> Tensor:
    tensors = tree_tensors(vars(output) if isinstance(output, Output) else output)
    return torch.stack([(t * t.detach().cos()).sum() for t in tensors]).sum()


@pytest.mark.parametrize(("kind", "shape"), FORWARDS, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_verify_finds_them_equivalent(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    report = bnrestructure.verify(built(kind), x, loss_fn=_loss, backend="reference", steps=1)
    assert report.ok, report


def test_what_follows_from_sizes_holds_for_all_of_them() -> None:
    """The branch is taken by the size; what is computed from sizes is not burnt in."""
    model = built(BySize)
    rewritten = restructured_copy(model)
    for n, width in ((2, 6), (3, 8), (4, 6), (2, 8), (3, 6), (3, 12)):
        x = torch.randn(n, 3, 6, width, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))


class ChecksItsInput(nn.Module):
    """Refuses what its strides do not divide, pools what is large, and repeats by a count that follows from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = stem(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if c != 3 or h % 2 != 0 or w % 2 != 0:
            raise ValueError(f"cannot take {h} x {w} of {c} channels")
        y = F.relu(self.norm(self.stem(x)))
        if h * w / 2 > 40.0:
            y = F.avg_pool2d(y, 2)
        for _ in range((n + 3) // 4):
            y = y * 1.5
        return y


def test_a_size_that_decides_is_captured_once_for_each_answer() -> None:
    """Not once for each size."""
    model = built(ChecksItsInput)
    rewritten = restructured_copy(model)
    seen = []
    for n, h, w in ((2, 6, 6), (3, 6, 6), (4, 6, 8), (2, 10, 10), (3, 12, 10), (5, 10, 10), (7, 12, 12), (2, 4, 12), (1, 8, 10)):
        x = torch.randn(n, 3, h, w, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))
        seen.append(bnrestructure.explain(rewritten).captures["the whole model"])
    assert seen == [1, 1, 1, 2, 2, 3, 3, 3, 3]
    for shape in ((2, 3, 7, 6), (2, 4, 6, 6)):
        with pytest.raises(ValueError, match="cannot take"):
            rewritten(torch.randn(shape, dtype=torch.float64))


def test_a_size_of_a_tensor_in_between_is_captured_once_for_each_size_of_the_input() -> None:
    """Nothing says how the size of what a layer returns follows from the input's."""

    class OfAnIntermediate(ChecksItsInput):
        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(self.stem(x), 2)
            return F.relu(self.norm(y if y.shape[2] > 3 else y * 2))

    model = built(OfAnIntermediate)
    rewritten = restructured_copy(model)
    for side in (6, 8, 6, 10):
        x = torch.randn(2, 3, side, side, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))
    assert bnrestructure.explain(rewritten).captures == {"the whole model": 3}


def test_a_seeded_run_draws_eagers_numbers() -> None:
    model, x = built(Tokens), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    rewritten = restructured_copy(model)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        batch = x.contiguous(memory_format=memory_format)
        assert_same_values(training_step(rewritten, batch, seed=3), training_step(model, batch, seed=3))
        torch.manual_seed(3)
        expected = model(batch)
        torch.manual_seed(3)
        actual = rewritten(batch)
        assert torch.equal(actual == 0, expected == 0)
        assert actual.stride() == expected.stride()


def test_a_child_that_is_compiled_by_torch_script() -> None:
    models = []
    for _ in range(2):  # PyTorch's copy of a ScriptModule has parameters that take no gradients
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = torch.jit.script(nn.Conv2d(3, 4, 1, dtype=torch.float64))
        models.append(nn.Sequential(child, *nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()))
    rewritten, model = bnrestructure.restructure(models[0], backend="reference"), models[1]
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for _ in range(2):
        assert_same_values(training_step(rewritten, x), training_step(model, x))
    assert bnrestructure.explain(rewritten).counts["kept"] == 0


@pytest.mark.parametrize("where", ["bn", "conv"])
def test_what_a_hook_keeps_is_overwritten_as_in_eager(where: str) -> None:
    """An in-place activation follows the hooked layer: eager's activation changes the tensor that the hook has kept."""
    kept = []
    for rewrite in (False, True):
        torch.manual_seed(0)
        layers = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True), "last": nn.Conv2d(4, 4, 1)}
        if where == "conv":
            layers = {"bn0": nn.BatchNorm2d(3), **{k: v for k, v in layers.items() if k != "bn"}}
        model = nn.Sequential(*layers.values()).double()
        found: list[Tensor] = []
        layers[where].register_forward_hook(lambda module, args, output, found=found: found.append(output))
        if rewrite:
            bnrestructure.restructure(model, backend="reference")
        model(torch.randn(2, 3, 6, 6, dtype=torch.float64)).sum().backward()
        kept.append(found[0].detach())
    assert kept[0].min() == 0
    torch.testing.assert_close(kept[1], kept[0])


def test_methods_that_call_parts_of_a_model_run_rewritten() -> None:
    """As timm's forward_features, or a LightningModule's training_step: forward() is never called."""
    model = built(Generator)
    rewritten = restructured_copy(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for actual, expected in zip(rewritten.features(x), model.features(x), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(actual, expected)
    assert bnrestructure.explain(rewritten).captures == {"stages.0": 1, "stages.1": 1}
