"""A branch that squeeze-excite gates before the shortcut is added and activated: SE-ResNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.graph.ir import Conv, Residual
from bnrestructure.passes.pipeline import PASSES


class _Net(nn.Module):
    """A stem, and convolutions with batch norms; ``body`` makes of them what it likes, of the stem's result x and bn1's result z."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.bn0, self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(channels) for _ in range(4))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.conv3, self.conv4 = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
        self.gate1, self.gate2 = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.single = nn.Parameter(torch.rand(channels, 1, 1))
        for bn in (self.bn0, self.bn1, self.bn2, self.bn3):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.bias, -0.5, 0.5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        return self.body(self, x, self.bn1(self.conv1(x)))


def _gated(gate: nn.Module, z: Tensor) -> Tensor:
    return z * gate(z.mean((2, 3), keepdim=True)).sigmoid()


def _blocks(m: Any, x: Tensor, z: Tensor) -> Tensor:
    """Two blocks, as SE-ResNets have them: the sum of the first is the second one's shortcut."""
    x = F.relu(_gated(m.gate1, z) + x)
    return m.conv4(F.relu(_gated(m.gate2, m.bn2(m.conv3(x))) + x))


#: (the body, how many sums have a gated branch, how many of them a convolution forms).
BODIES: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], int, int]] = {
    "relu, to the caller": (lambda m, x, z: F.relu(_gated(m.gate1, z) + x), 1, 0),
    "relu, to a convolution": (lambda m, x, z: m.conv3(F.relu(_gated(m.gate1, z) + x)), 1, 1),
    "the shortcut first, in place": (lambda m, x, z: m.conv3((x * 1.0).add_(_gated(m.gate1, z)).relu_()), 1, 1),
    "silu, to a 3x3 convolution": (lambda m, x, z: m.conv2(F.silu(x + _gated(m.gate1, z))), 1, 1),
    "two blocks": (_blocks, 2, 2),
    "a shortcut with a batch norm": (lambda m, x, z: m.conv4(F.relu(_gated(m.gate1, z) + m.bn2(m.conv3(x)))), 1, 1),
    "that is the later one": (lambda m, x, z: m.conv4(F.silu(m.bn2(m.conv3(x)) + _gated(m.gate1, z))), 1, 1),
    "two gates": (lambda m, x, z: m.conv4(F.relu(_gated(m.gate1, z) + _gated(m.gate2, m.bn2(m.conv3(x))))), 1, 1),
    "a batch norm behind": (lambda m, x, z: m.conv3(F.relu(m.bn2(_gated(m.gate1, z) + x))), 1, 0),
    "a batch norm behind relu": (lambda m, x, z: m.conv3(m.bn2(F.relu(_gated(m.gate1, z) + x))), 1, 0),
    "nothing behind": (lambda m, x, z: m.conv3(_gated(m.gate1, z) + x), 0, 0),
    "an activated branch": (lambda m, x, z: m.conv3(F.relu(_gated(m.gate1, F.silu(z)) + x)), 0, 0),
    "a shortcut that broadcasts": (lambda m, x, z: m.conv3(F.relu(_gated(m.gate1, z) + m.single)), 0, 0),
    "a branch that others read": (lambda m, x, z: (lambda p: m.conv3(F.relu(p + x)) + p)(_gated(m.gate1, z)), 0, 0),
    "twice the branch": (lambda m, x, z: (lambda p: m.conv3(F.relu(p + p)))(_gated(m.gate1, z)), 0, 0),
}


@pytest.mark.parametrize("body", BODIES)
def test_the_join_gates_its_operand(body: str) -> None:
    made, count, in_convolutions = BODIES[body]
    model = _Net(made).double()
    graph = after(model, *PASSES).graph
    formed = [conv for conv in Conv.every(graph) if conv.forms_residual and conv.gate is not None]
    swept = [residual for residual in Residual.every(graph) if residual.gate is not None]
    assert (len(formed) + len(swept), len(formed)) == (count, in_convolutions)
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64)
    assert_same_training(model, x)
    assert_same_training(model, x, options={"backend": "auto"})


def test_the_plan_says_so() -> None:
    plan = bnrestructure.explain(_Net(_blocks).train(), torch.randn(2, 3, 9, 7))
    found = {site.name: (site.pattern, site.status, site.reason) for site in plan.sites}
    assert found["bn1"] == found["bn2"] == ("conv-bn-add-relu", "fused", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", ["two blocks", "a shortcut with a batch norm", "silu, to a 3x3 convolution", "a batch norm behind"])
def test_on_the_cpu_kernels(body: str, dtype: torch.dtype) -> None:
    report = bnrestructure.verify(_Net(BODIES[body][0], 24).train(), torch.randn(4, 3, 17, 13), dtype=dtype)
    assert report.ok, report


def test_the_callers_gradient_stays_as_it_is() -> None:
    """The sum's gradient is the caller's own: the gradient that both operands come from is another tensor."""
    model = bnrestructure.restructure(_Net(BODIES["relu, to the caller"][0]).train())
    gradient = torch.randn(4, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    before = gradient.clone()
    model(torch.randn(4, 3, 9, 7)).backward(gradient)
    assert torch.equal(gradient, before)
