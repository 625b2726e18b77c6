"""Residual joins that a convolution forms and finishes (ops/join.py): whoever else reads the sum, and whatever takes part in backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.capture.regions import Options
from bnrestructure.graph.ir import Conv
from bnrestructure.plan.survey import take_survey


class Parts(nn.Module):
    """Convolutions and batch norms of six channels; a function of the module and its input is the forward."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(6, 6, k, padding=k // 2, bias=k == 3) for k in (3, 1, 3, 1)])
        self.stride = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(4)])
        self.wide, self.narrow = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)

    def join(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return F.relu(self.norms[0](self.convs[0](x)) + shortcut)

    def read(self, z: Tensor, i: int = 1) -> Tensor:
        return self.norms[i](self.convs[i](z))


def _next_join(m: Any, x: Tensor) -> Tensor:
    z = m.join(x, x)
    return F.relu(m.read(z) + z)


def _both_normalised(m: Any, x: Tensor) -> Tensor:
    z = F.relu(m.read(x, 0) + m.read(x, 1))
    return F.relu(m.read(z, 2) + z)


def _activation_taken_back(m: Any, x: Tensor) -> Tensor:
    """Both readers apply the activation; each could do so in its own prologue."""
    z = m.join(x, x)
    return m.read(z, 1) + m.norms[2](m.stride(z)).mean()


def _different_activations(m: Any, x: Tensor) -> Tensor:
    s = m.read(x, 0) + x
    return m.read(F.relu(s), 1) + m.read(F.silu(s), 2)


def _four_readers(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = m.join(x, x)
    return m.read(z, 1) + m.read(z, 2) + z, z.tanh()


def _through_a_concat(m: Any, x: Tensor) -> Tensor:
    z = m.join(x, x)
    return torch.cat([m.read(z, 1), z], 1)


def _written_into_a_concat(m: Any, x: Tensor) -> Tensor:
    z = m.join(x, x)
    return m.narrow(F.relu(m.wide(torch.cat([m.convs[1](z), m.convs[3](z)], 1)))) + z


def _smooth(m: Any, x: Tensor) -> Tensor:
    z = F.gelu(m.read(x, 0) + x)
    return m.read(z, 1) + z


def _leaky_for_both(m: Any, x: Tensor) -> Tensor:
    """An activation that is not the same applied twice, read by two convolutions."""
    z = F.leaky_relu(m.read(x, 0) + x, 0.3)
    return m.read(z, 1) + m.read(z, 2)


def _own_weight(m: Any, x: Tensor) -> Tensor:
    """A convolution of the sum with itself as its weight: no reader like the others."""
    s = F.leaky_relu(m.read(x[:1], 0) + x[:1], 0.3)
    return F.conv2d(s, s, padding=3) * s.mean()


def _linear(m: Any, x: Tensor) -> Tensor:
    z = m.read(x, 0) + x
    return m.read(z, 1) + z


BODIES = {
    "the next join reads the sum": _next_join,
    "both operands are normalised": _both_normalised,
    "the activation is taken back into the join": _activation_taken_back,
    "readers with different activations": _different_activations,
    "four readers, one of them not ours, one the output": _four_readers,
    "a concat reads the sum": _through_a_concat,
    "its convolutions write into a concat": _written_into_a_concat,
    "gelu": _smooth,
    "leaky for both readers": _leaky_for_both,
    "the sum is also the weight": _own_weight,
    "no activation": _linear,
    "the shortcut is broadcast": lambda m, x: (lambda z: m.read(z) + z)(m.join(x, x.mean((2, 3), keepdim=True))),
    "the branch is broadcast": lambda m, x: (lambda z: m.read(z) + z)(m.join(x.mean((2, 3), keepdim=True), x)),
    "the shortcut is the branch's own input": lambda m, x: (lambda y: m.read(F.relu(m.norms[2](m.convs[3](y)) + y)))(m.convs[2](x)),
}


#: Where no convolution forms the join: its sum has other readers that cannot have it from the convolution.
NOT_FORMED = ("readers with different activations", "the sum is also the weight")


def joins_in(model: nn.Module) -> int:
    """How many convolutions of the rewritten graph form a join."""
    graphs = [region.after.graph for region in take_survey(model, Options()).regions]
    return sum(conv.forms_residual for graph in graphs for conv in Conv.every(graph))


def images() -> Tensor:
    return torch.randn(3, 6, 7, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", BODIES)
def test_values_and_gradients(name: str) -> None:
    model, x = Parts(BODIES[name]).double(), images()
    assert joins_in(model) == (0 if name in NOT_FORMED else 1)
    expected = training_step(copy.deepcopy(model), x)
    assert_same_values(training_step(restructured_copy(model), x), expected)
    contiguous = training_step(restructured_copy(model), x.contiguous(memory_format=torch.channels_last))
    assert_same_values(contiguous, expected)


@pytest.mark.parametrize("name", BODIES)
def test_on_the_devices_own_kernels(name: str) -> None:
    """In float32, within what eager itself is off."""
    report = bnrestructure.verify(Parts(BODIES[name]), images().float())
    assert report.ok, str(report)


@pytest.mark.parametrize("used", ["sum", "convolution", "neither"])
def test_what_takes_part_in_backward(used: str) -> None:
    """The convolution's result, or the other readers' share, may have no gradient at all."""

    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = m.join(x, x)
        return m.read(z, 1), m.read(z, 2) + z, m.convs[2](x)

    def loss(outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[{"convolution": 0, "sum": 1, "neither": 2}[used]].square().sum()

    model, x = Parts(body).double(), images()
    assert joins_in(model) == 1
    assert_same_values(training_step(restructured_copy(model), x, loss=loss), training_step(copy.deepcopy(model), x, loss=loss))


@pytest.mark.parametrize("frozen", ["convs.0", "convs.1", "norms.0", "norms.1", "everything but norms.0"])
def test_frozen_parameters(frozen: str) -> None:
    model, x = Parts(_next_join).double(), images()
    for name, parameter in model.named_parameters():
        inside = name.startswith(frozen.removeprefix("everything but "))
        parameter.requires_grad_(inside == frozen.startswith("everything"))
    assert_same_values(training_step(restructured_copy(model), x), training_step(copy.deepcopy(model), x))


def test_backward_twice() -> None:
    """With retain_graph the saved tensors are read again: nothing that backward needs was overwritten."""
    model, x = restructured_copy(Parts(_next_join).double()), images().requires_grad_()
    out = model(x).square().sum()
    first = torch.autograd.grad(out, [x, *model.parameters()], retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(out, [x, *model.parameters()], allow_unused=True)
    assert [g is None for g in first] == [g is None for g in second]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


def test_the_callers_gradient_is_not_written_to() -> None:
    """The sum is an output of the model: its gradient is the caller's memory, not the thread's."""

    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        z = m.join(x, x)
        return z, m.read(z, 1)

    model, x = restructured_copy(Parts(body).double()), images().requires_grad_()
    outputs = model(x)
    given = [torch.randn_like(out) for out in outputs]
    before = [g.clone() for g in given]
    torch.autograd.backward(outputs, given)
    assert all(torch.equal(g, b) for g, b in zip(given, before, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_autocast(first: bool) -> None:
    """A shortcut in float32 beside a branch in bfloat16 is joined in float32, in a step of its own; later ones in bfloat16."""

    def body(m: Any, x: Tensor) -> Tensor:
        z = m.join(x, x if first else m.read(x, 3))
        return F.relu(m.read(z) + z)

    model = Parts(body)
    assert joins_in(model) == 1
    report = bnrestructure.verify(model, images().float(), dtype=torch.bfloat16)
    assert report.ok, str(report)


def test_a_broadcast_shortcuts_gradient_is_not_the_callers() -> None:
    """x is the last of a thread, and PyTorch's add hands down the very tensor that the caller gave: stride 0, from a sum."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(6, 6, 1) for _ in range(3)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(2)])

        def forward(self, i: Tensor) -> Tensor:
            x = self.convs[0](i)
            a = F.relu(self.norms[0](self.convs[1](x)))
            return x + self.norms[1](self.convs[2](F.adaptive_avg_pool2d(a, 1)))

    model, x = Model().double(), images()
    expected = training_step(copy.deepcopy(model), x, loss=lambda out: out.sum())
    assert_same_values(training_step(restructured_copy(model), x, loss=lambda out: out.sum()), expected)
    given, ours = torch.randn(3, 6, 7, 6, dtype=torch.float64), restructured_copy(model)
    before = given.clone()
    ours(x).backward(given)
    assert torch.equal(given, before)


def test_a_frozen_join_computes_no_gradient() -> None:
    """Behind a frozen backbone in training mode only the convolution's own weight has a gradient, and no dgrad is run for it."""
    model = restructured_copy(Parts(lambda m, x: m.read(m.join(x, x))).double())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("convs.1", "norms.1")))
    assert joins_in(bnrestructure.unrestructure(copy.deepcopy(model))) == 1
    out = model(images())
    names, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node.name() not in names:
            names.add(node.name())
            stack += [function for function, _ in node.next_functions]
    assert any("PlainConv" in name for name in names)
    assert not any("Join" in name or "Residual" in name for name in names)
