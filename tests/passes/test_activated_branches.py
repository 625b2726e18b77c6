"""A branch that is activated, or gated, before the shortcut is added: Darknet's and YOLO's bottlenecks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.graph.ir import Normalise
from bnrestructure.passes.pipeline import PASSES


class _Net(nn.Module):
    """Two convolutions with batch norms behind a stem; ``body`` adds what it likes."""

    def __init__(self, body: Callable[[_Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0, self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(4))
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        return self.body(self, x, self.bn1(self.conv1(x)))


def _gated(m: _Net, z: Tensor) -> Tensor:
    return z * m.conv2(z.mean((2, 3), keepdim=True)).sigmoid()


#: (the body, how many sums ride on a branch).
BODIES: dict[str, tuple[Callable[[_Net, Tensor, Tensor], Tensor], int]] = {
    "a bottleneck": (lambda m, x, y: m.conv2(x + F.silu(y)), 1),
    "the branch first": (lambda m, x, y: m.conv2(F.silu(y) + x), 1),
    "in place": (lambda m, x, y: m.conv2(F.silu(y, inplace=True).add_(x)), 1),
    "two bottlenecks": (lambda m, x, y: (lambda s: s + F.gelu(m.bn2(m.conv2(s))))(x + F.silu(y)), 2),
    "two branches": (lambda m, x, y: m.conv3(F.silu(m.bn2(m.conv2(x))) + F.relu(y)), 1),
    "a batch norm behind": (lambda m, x, y: m.conv3(m.bn2(F.silu(y) + x)), 1),
    "a gate": (lambda m, x, y: m.conv3(_gated(m, F.silu(y)) + x), 1),
    "a gate on a linear branch": (lambda m, x, y: m.conv3(x + _gated(m, y)), 1),
    "a shortcut that broadcasts": (lambda m, x, y: m.conv2(F.silu(y) + m.scale), 0),
    "the result handed to the caller": (lambda m, x, y: F.silu(y) + x, 1),
    "the input of the batch norm": (lambda m, x, y: (lambda c: m.conv3(F.silu(m.bn2(c)) + c))(m.conv2(x)), 1),
    "a branch that others read, and the stem": (lambda m, x, y: (lambda z: m.conv2(z + x) + z)(F.silu(y)), 1),
    "branches that others read": (lambda m, x, y: (lambda z: m.conv2(z + x) + z * x)(F.silu(y)), 0),
    "a linear branch": (lambda m, x, y: m.conv2(y + x), 0),
    "twice the branch": (lambda m, x, y: (lambda z: m.conv2(z + z))(F.silu(y)), 0),
}


@pytest.mark.parametrize("body", BODIES)
def test_the_sweep_of_the_branch_adds_the_shortcut(body: str) -> None:
    made, count = BODIES[body]
    model = _Net(made).double()
    assert sum(normalise.r is not None for normalise in Normalise.every(after(model, *PASSES).graph)) == count
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64)
    assert_same_training(model, x)
    assert_same_training(model, x, options={"backend": "auto"})


def test_the_plan_says_so() -> None:
    plan = bnrestructure.explain(_Net(BODIES["a bottleneck"][0]).train(), torch.randn(2, 3, 9, 7))
    (site,) = [site for site in plan.sites if site.name == "bn1"]
    assert (site.pattern, site.status, site.reason) == ("conv-bn-silu-add", "fused", None)


def test_a_wider_shortcut_widens_the_sum() -> None:
    model = _Net(lambda m, x, y: F.silu(y) + x.double()).train()
    x = torch.randn(4, 3, 9, 7)
    plain = model(x)
    found = bnrestructure.restructure(model, backend="reference")(x)
    assert found.dtype is plain.dtype is torch.float64
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", ["two bottlenecks", "a gate"])
def test_on_the_cpu_kernels(body: str, dtype: torch.dtype) -> None:
    report = bnrestructure.verify(_Net(BODIES[body][0]).train(), torch.randn(4, 3, 17, 13), dtype=dtype)
    assert report.ok, report


def test_the_callers_gradient_stays_as_it_is() -> None:
    """The shortcut's gradient is the result's, the caller's own: links behind the shortcut add to a copy of it."""
    model = bnrestructure.restructure(_Net(lambda m, x, y: F.silu(y) + x).train())
    gradient = torch.randn(4, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    before = gradient.clone()
    model(torch.randn(4, 3, 9, 7)).backward(gradient)
    assert torch.equal(gradient, before)
