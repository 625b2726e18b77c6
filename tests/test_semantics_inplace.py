"""In-place operations, views and shared memory: the restructured model sees the same values, at the same times, as eager."""

from __future__ import annotations

import copy

import pytest
import torch
from equivalence import assert_same_training, restructured_copy, training_step, tree_tensors
from small_models import build, conv_bn, input_for
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


class _Two(nn.Module):
    """conv-bn twice and a third convolution: what happens in between is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 6, 1)
        self.relu, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)


class InplaceReluReadLater(_Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        z = self.relu(y)
        return self.conv2(z) + y  # y has been rectified


class InplaceOnJoin(_Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        identity = y
        out = self.bn2(self.conv2(y.relu()))
        out += identity
        out.relu_()
        return self.conv3(out) * out


class InplaceOnView(_Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y[:, :3].mul_(2.0)
        return self.conv2(F.relu(y))


class InplaceOnFlatView(_Two):
    """``view`` of a convolution's output, changed in place: a reshape that copied would lose the change."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(F.relu(self.bn1(self.conv1(x))))
        flat = y.view(y.shape[0], -1)
        flat.mul_(0.5)
        return self.conv2(y)


class InplaceThroughFlatten(_Two):
    """``flatten`` is a view of a contiguous tensor and a copy of a channels_last one: which one is eager's to say."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(F.relu(self.bn1(self.conv1(x))))
        y.flatten(1).mul_(0.5)
        return self.conv2(F.relu(self.bn2(y)))


class InplaceAfterConcat(_Two):
    """The concat has copied y by the time y changes: it must not have become a slice of the concat's memory."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv3(F.relu(self.bn1(self.conv1(x))))
        joined = torch.cat([self.conv1(x), y], 1)
        y[:, :2].mul_(2.0)
        return joined, self.conv2(F.relu(self.bn2(y)))


class InplaceOnInput(_Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(x)
        return self.bn1(self.conv1(y)) + x.mean()


class ReadThenOverwritten(_Two):
    """The input is rectified, joined and concatenated, then overwritten, before what reads the results runs: none may read it late."""

    def __init__(self) -> None:
        super().__init__()
        self.conv4, self.bn4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        joined = torch.cat([self.bn1(self.conv1(x * 1.0)), x], 1)
        total = self.bn4(self.conv4(y)) + x
        x.mul_(2.0)
        return self.conv1(y) + self.conv1(F.relu(total)) + joined[:, 3:] + x.mean()


class OverwrittenThenJoined(_Two):
    """A batch norm's output is overwritten while a dropout, which may hand on its input, reads it; then a concat reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.bn3 = nn.BatchNorm2d(12)
        self.conv4 = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        F.hardswish(y, inplace=True)
        dropped = F.dropout(y, 0.2, self.training)
        joined = torch.cat([self.conv2(dropped), y], 1)
        return self.conv4(F.relu(self.bn3(joined)))


class LeakyInplace(_Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.leaky(self.bn1(self.conv1(x))))


class InplaceAddShared(_Two):
    """Both operands of += are read again."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(self.conv1(x))
        b = self.bn2(self.conv2(F.relu(a)))
        a += b
        b = b - a
        a *= 0.5
        return self.conv3(F.relu(a)) + b


class PositionalInplace(_Two):
    """F.dropout(x, p, training, inplace): two positional True in a row."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.bn1(self.conv1(x)), 0.5, True, True)
        return self.conv2(F.relu(y, True))


class ReturnsBoth(_Two):
    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.bn1(self.conv1(x))
        before = y * 1.0
        z = F.relu_(y)
        return [y, before, self.conv2(z), z]


class WrittenConstant(_Two):
    """A tensor made in forward() and written to: fresh in every step."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(6, dtype=torch.float64)
        y = F.relu(self.bn1(self.conv1(x)))
        total += y.mean((0, 2, 3))
        return self.conv2(y) * total.view(1, -1, 1, 1)


class ChunkedInplace(_Two):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        a, b = y.chunk(2, dim=1)
        a = a + 1
        a.add_(b)
        return self.conv2(torch.cat([b, a], 1))


class DropoutInplace(_Two):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.drop(self.bn1(self.conv1(x)))))


class IdentityJoin(_Two):
    """A linear bottleneck's join whose result is the output; x has other readers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x + self.bn2(self.conv2(self.conv3(x)))


class SelfJoin(_Two):
    """The convolution of the branch reads what the join reads: its gradient is threaded through both."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x + self.bn2(self.conv2(x))


class JoinWithItself(_Two):
    """y + bn(y): the join is y's only reader, and reads it twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.conv2(F.relu(y + self.bn1(y)))
        return self.bn2(z) + z


class SelfConcat(_Two):
    """The same with a concat for a join."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y = self.bn2(self.conv2(x))
        return torch.cat([x, self.conv3(F.relu(y))], 1)


class ConcatsOfConcats(_Two):
    def __init__(self) -> None:
        super().__init__()
        self.conv4, self.bn3 = nn.Conv2d(12, 4, 1), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(x)
        a = torch.cat([self.conv3(F.relu(self.bn1(x))), x], 1)
        b = torch.cat([a, self.conv4(F.relu(self.bn3(a))), self.conv2(x)], 1)
        return b, a


class ChainOfIdentityJoins(_Two):
    """Joins without an activation hand the same gradient tensor to both operands: it must not be written while shared."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        a = x + self.bn1(self.conv2(x))
        b = a + self.bn2(self.conv3(a))
        return b + a * 2 + (x + b)


MODELS = [
    InplaceReluReadLater, InplaceOnJoin, InplaceOnView, InplaceOnFlatView, InplaceThroughFlatten, InplaceAfterConcat, InplaceOnInput,
    ReadThenOverwritten, OverwrittenThenJoined, LeakyInplace, InplaceAddShared,
    PositionalInplace, ReturnsBoth, WrittenConstant, ChunkedInplace, DropoutInplace, IdentityJoin, SelfJoin, JoinWithItself, SelfConcat,
    ConcatsOfConcats, ChainOfIdentityJoins,
]  # fmt: skip


class _CopyOfInput(nn.Module):
    """Lets a model that overwrites its input be differentiated with respect to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 1.0)


FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


@FORMATS
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_inplace(model: type[nn.Module], memory_format: torch.memory_format) -> None:
    if model is InplaceOnFlatView and memory_format == torch.channels_last:
        pytest.skip("eager cannot view a channels_last tensor")
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    assert_same_training(_CopyOfInput(model()).double(), x, steps=2)


def test_inplace_leaky_relu_rides_in_the_prologue() -> None:
    plan = bnrestructure.explain(LeakyInplace(), backend="reference")
    assert plan.sites[0].status == "fused", plan.sites[0].reason


class DenseThenForeign(nn.Module):
    """A region whose output is overwritten by code that the tracer cannot follow."""

    def __init__(self, overwrite: bool) -> None:
        super().__init__()
        self.block = _GrowingConcat()
        self.overwrite = overwrite

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if float(y.detach().sum()) == float("inf"):  # data-dependent: the tracer stops here
            raise RuntimeError("unreachable")
        return F.relu_(y) if self.overwrite else F.relu(y)


class _GrowingConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.ModuleList([conv_conv(4), conv_conv(6), conv_conv(8)])

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        for layer in self.conv:
            features = torch.cat([features, layer(features)], 1)
        return features


def conv_conv(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(inputs, 2, 3, padding=1))


@FORMATS
@pytest.mark.parametrize("overwrite", [False, True], ids=["read", "overwritten"])
def test_output_that_later_code_overwrites(overwrite: bool, memory_format: torch.memory_format) -> None:
    """Eager allows it: nothing saved the last concat. A shared buffer must not make it a wrong gradient."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    assert_same_training(DenseThenForeign(overwrite).double(), x)


def test_output_of_a_join_may_be_overwritten() -> None:
    """``x + bn(y)``: eager's add saves nothing, so its result is the caller's to overwrite."""
    original, x = IdentityJoin().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    rewritten = restructured_copy(original)
    for model in (original, rewritten):
        model(x).mul_(2.0).sum().backward()
    for (name, expected), actual in zip(original.named_parameters(), rewritten.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["inverted", "dense", "inception", "residual", "unet", "preact"])
def test_the_callers_gradient_is_not_written_to(name: str) -> None:
    model = restructured_copy(build(name))
    outputs = model(input_for(name).requires_grad_())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(o) for o in outputs]
    kept = [g.clone() for g in gradients]
    torch.autograd.backward(outputs, gradients)
    assert all(torch.equal(g, k) for g, k in zip(gradients, kept, strict=True))


@FORMATS
@pytest.mark.parametrize("model", [IdentityJoin, SelfJoin, SelfConcat, ConcatsOfConcats, ChainOfIdentityJoins])
def test_expanded_and_shared_incoming_gradients(model: type[nn.Module], memory_format: torch.memory_format) -> None:
    """``out.sum().backward()`` hands in a gradient of stride zero; a gradient that the caller hands in stays the caller's."""
    original, x = model().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    rewritten = restructured_copy(original)
    for m in (original, rewritten):
        _sum_of(m(x)).backward()
        outputs = tree_tensors(m(x))
        gradients = [torch.cos(torch.arange(o.numel(), dtype=o.dtype)).view(o.shape).to(memory_format=memory_format) for o in outputs]
        kept = [g.clone() for g in gradients]
        torch.autograd.backward(outputs, gradients)
        assert all(torch.equal(g, k) for g, k in zip(gradients, kept, strict=True))
    for (name, expected), actual in zip(original.named_parameters(), rewritten.named_parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(actual[1].grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


def _sum_of(outputs: object) -> Tensor:
    return torch.stack([o.sum() for o in tree_tensors(outputs)]).sum()


@pytest.mark.parametrize("name", ["residual", "dense", "inverted", "squeeze_excite"])
def test_gradients_do_not_share_memory(name: str) -> None:
    model = restructured_copy(build(name))
    training_step(model, input_for(name))
    pointers = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    assert len(set(pointers)) == len(pointers)


def test_input_is_not_written_to() -> None:
    for name in ("residual", "dense", "inception", "inverted", "unet"):
        x = input_for(name)
        kept = x.clone()
        training_step(restructured_copy(build(name)), x)
        restructured_copy(build(name))(x)
        assert torch.equal(x, kept)


def test_stem_in_place_overwrites_the_input_as_eager_does() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), conv_bn(3, 4)).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    y = x.clone()
    copy.deepcopy(model)(x)
    restructured_copy(model)(y)
    assert torch.equal(x, y)
