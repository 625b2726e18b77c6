"""Views with PyTorch's negative bit, whose numbers have the other sign in memory, mean what they mean in eager wherever kernels meet one.

PyTorch makes one of the imaginary part of a conjugate (``x.conj().imag``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from needs import needs_kernels
from stems import stem
from torch import Tensor, nn

import bnrestructure


def negated(x: Tensor) -> Tensor:
    """x itself, in a view with the negative bit."""
    view = torch.view_as_complex(torch.stack((x, -x), -1)).conj().imag
    assert view.is_neg()
    return view


class NegatedGradient(torch.autograd.Function):
    """x; the gradient has the negative bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return negated(gradient)


class Net(nn.Module):
    """A stem, and layers for a body to choose from."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.body = stem(4), body
        self.bn, self.conv, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn2, self.wide = nn.BatchNorm2d(4), nn.Conv2d(8, 4, 1)
        self.pool, self.squeeze = nn.MaxPool2d(2), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.stem(x))

    def site(self, y: Tensor) -> Tensor:
        """A batch norm between two convolutions."""
        return self.bn2(self.conv(self.bn(y).relu()))


def _gated_by_a_view(m: Net, y: Tensor) -> Tensor:
    y = m.bn(y)
    return m.last(y * negated(m.squeeze(y)))


BODIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a convolution's input": lambda m, y: m.site(negated(y)).relu(),
    "statistics' input": lambda m, y: m.last(m.bn(negated(y)).relu()),
    "a shortcut": lambda m, y: m.last((m.site(y) + negated(y)).relu()),
    "a branch": lambda m, y: m.last((negated(m.site(y)) + y).relu()),
    "a shortcut that others read": lambda m, y: (lambda z: m.last(z) + z)((m.site(y) + negated(y)).relu()),
    "a part of a concat": lambda m, y: m.wide(torch.cat((m.site(y), negated(y)), 1)),
    "a gate": _gated_by_a_view,
    "a pool's input": lambda m, y: m.last(m.pool(m.bn(negated(y)).relu())),
    "the gradient of a convolution": lambda m, y: NegatedGradient.apply(m.conv(m.bn(y).relu())),
    "the gradient of a convolution with statistics": lambda m, y: m.bn2(NegatedGradient.apply(m.conv(m.bn(y).relu()))).relu(),
    "the gradient of an activation": lambda m, y: NegatedGradient.apply(m.site(y).relu()),
    "the gradient of a sum": lambda m, y: NegatedGradient.apply((m.site(y) + y).relu()),
    "the gradient of a pool": lambda m, y: NegatedGradient.apply(m.pool(m.site(y).relu())),
    "a share of a gradient": lambda m, y: (lambda z: m.last(z) + NegatedGradient.apply(z))(m.site(y).relu()),
}


@needs_kernels
@pytest.mark.parametrize("name", BODIES)
def test_wherever_kernels_meet_one(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(BODIES[name]), torch.randn(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    rewritten = restructured_copy(model, backend="cpu")
    expected, actual = training_step(model, x), training_step(rewritten, x)
    assert bnrestructure.explain(rewritten).counts["fused"] > 0
    assert_same_values(actual, expected, 1e-3)


@needs_kernels
@pytest.mark.parametrize("which", ["conv.weight", "bn.weight", "bn.bias"])
def test_a_parameter(which: str) -> None:
    torch.manual_seed(0)
    model, x = Net(lambda m, y: m.site(y).relu()), torch.randn(3, 3, 8, 8)
    rewritten = restructured_copy(model, backend="cpu")
    for m in (model, rewritten):
        owner, name = m.get_submodule(which.split(".")[0]), which.split(".")[1]
        setattr(owner, name, nn.Parameter(negated(getattr(model.get_submodule(which.split(".")[0]), name).detach())))
        assert getattr(owner, name).is_neg()
    assert_same_values(training_step(rewritten, x), training_step(model, x), 1e-3)
    assert bnrestructure.explain(rewritten).counts["fused"] > 0
