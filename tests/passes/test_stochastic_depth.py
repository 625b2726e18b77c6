"""Stochastic depth: a normalised branch times a random factor of each image, in one sweep with the sum behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_training
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import bnrestructure
from bnrestructure import ops
from bnrestructure.capture.regions import Options
from bnrestructure.core.edges import Transform
from bnrestructure.graph.ir import Normalise
from bnrestructure.plan.survey import take_survey


def _dropped(x: Tensor, keep: float = 0.7) -> Tensor:
    """timm's DropPath."""
    return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)


class _Net(nn.Module):
    """Two convolutions with batch norms behind a stem; ``body`` is given the stem's result and the first of them, normalised."""

    def __init__(self, body: Callable[[_Net, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0, self.bn1, self.bn2 = (nn.BatchNorm2d(8) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.row, self.batch, self.never = StochasticDepth(0.4, "row"), StochasticDepth(0.4, "batch"), StochasticDepth(0.0, "row")
        self.layer_scale = nn.Parameter(torch.rand(8, 1, 1))
        self.learned = nn.Parameter(torch.rand(1, 1, 1, 1))
        self.body = body

    def forward(self, x: Tensor) -> object:
        x = F.relu(self.bn0(self.stem(x)))
        return self.body(self, x, self.bn1(self.conv1(x)))


#: (the body, the sweeps that multiply, those that add a shortcut as well).
BODIES: dict[str, tuple[Callable[[_Net, Tensor, Tensor], object], int, int]] = {
    "torchvision's, by row": (lambda m, x, y: m.conv2(m.row(y) + x), 1, 1),
    "torchvision's, by batch": (lambda m, x, y: m.conv2(m.batch(y) + x), 1, 1),
    "in place": (lambda m, x, y: m.conv2(m.row(y).add_(x)), 1, 1),
    "timm's": (lambda m, x, y: m.conv2(x + _dropped(y)), 1, 1),
    "behind an activation": (lambda m, x, y: m.conv2(m.row(F.silu(y)) + x), 1, 1),
    "without a sum": (lambda m, x, y: m.conv2(m.row(F.gelu(y))), 1, 0),
    "the factor first": (lambda m, x, y: m.conv2(x.new_ones(4, 1, 1, 1).bernoulli_(0.5) * y + x), 1, 1),
    "a batch norm behind": (lambda m, x, y: m.conv2(m.bn2(m.row(y) + x)), 1, 1),
    "in a concat": (lambda m, x, y: torch.cat([m.row(F.silu(y)), x.tanh()], 1).sigmoid(), 1, 0),
    "returned": (lambda m, x, y: m.row(y), 1, 0),
    "a wider factor": (lambda m, x, y: m.conv2((y * torch.rand(4, 1, 1, 1, dtype=torch.float32)).to(x.dtype) + x), 0, 0),
    "never": (lambda m, x, y: m.conv2(F.silu(m.never(y)) + x), 0, 0),
    "by pixel": (lambda m, x, y: m.conv2(y * torch.rand_like(y[:, :1]) + x), 0, 0),
    "a layer's scale": (lambda m, x, y: m.conv2(y * m.layer_scale + x), 0, 0),
    "a factor that is learned": (lambda m, x, y: m.conv2(y * m.learned + x), 0, 0),
    "a factor that is computed of what is learned": (lambda m, x, y: m.conv2(y * (m.learned * 2) + x), 0, 0),
    "a factor that is drawn and learned": (lambda m, x, y: m.conv2(y * (m.learned * x.new_ones(4, 1, 1, 1).bernoulli_(0.5)) + x), 0, 0),
    "read by others": (lambda m, x, y: m.conv2(m.row(y) + y), 0, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", ["torchvision's, by row", "timm's", "behind an activation", "in a concat"])
def test_on_the_cpu_kernels(body: str, dtype: torch.dtype) -> None:
    report = bnrestructure.verify(_Net(BODIES[body][0]).train(), torch.randn(4, 3, 17, 13), dtype=dtype)
    assert report.ok, report


def test_the_plan_says_so() -> None:
    plan = bnrestructure.explain(_Net(BODIES["torchvision's, by row"][0]).train(), torch.randn(4, 3, 9, 7))
    (site,) = [site for site in plan.sites if site.name == "bn1"]
    assert (site.pattern, site.status, site.reason) == ("conv-bn-add", "fused", None)


def test_another_factor_is_multiplied_as_pytorch_does() -> None:
    """What capture saw of a factor need not hold in each call: the node looks again."""
    x, vectors = torch.randn(4, 8, 5, 3, dtype=torch.float64), torch.rand(3, 8, dtype=torch.float64)
    for factor in (torch.rand(4, 8, 1, 1), torch.rand(1, 1, 5, 3), torch.rand(4, 1, 1, 1), torch.tensor(2.0), torch.rand(2, 4, 8, 5, 3)):
        factor = factor.double()
        for learned in (False, True):
            leaves = x.clone().requires_grad_(), factor.clone().requires_grad_(learned)
            z, *_ = ops.normalise(leaves[0], Transform(*vectors, "silu"), factor=leaves[1], backend="reference")
            expected = F.silu((leaves[0] - vectors[0].view(-1, 1, 1)) * vectors[1].view(-1, 1, 1) + vectors[2].view(-1, 1, 1)) * leaves[1]
            torch.testing.assert_close(z, expected)
            wanted = leaves[: 1 + learned]
            for ours, theirs in zip(torch.autograd.grad(z.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True):
                torch.testing.assert_close(ours, theirs)


def _normalises(model: nn.Module, x: Tensor) -> list[Normalise]:
    """Those of the rewritten graph, captured with this input."""
    return [n for region in take_survey(model, Options(), (x,)).regions for n in Normalise.every(region.after.graph)]


@pytest.mark.parametrize("body", BODIES)
def test_one_sweep_normalises_multiplies_and_adds(body: str) -> None:
    made, multiplied, added = BODIES[body]
    model = _Net(made).double()
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64)
    found = _normalises(model, x)
    assert sum(n.factor is not None for n in found) == multiplied
    assert sum(n.factor is not None and n.r is not None for n in found) == added
    assert_same_training(model, x, steps=3)
    assert_same_training(model, x.to(memory_format=torch.channels_last), options={"backend": "auto"})
