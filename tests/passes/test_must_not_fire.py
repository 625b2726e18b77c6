"""Graphs that look like a pass's pattern and are not: the pass leaves them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pass_tools import graph_text, prefix_before, run_pass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class _Parts(nn.Module):
    """Two convolutions and two batch norms; a function of the module and its input is the forward."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.reflecting = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.uneven = nn.Conv2d(4, 4, 2, padding="same")
        self.norm = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.bn3d = nn.BatchNorm3d(4)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.own = _OwnBatchNorm(4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class _OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


def _inplace_on_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    y[:, :2].add_(1.0)
    return m.bn1(y)


def _made_twice(m: Any, x: Tensor) -> Tensor:
    y = m.conv2(m.bn1(x))
    return torch.cat([x, y], 1).exp() + torch.cat([x, y], 1).tanh()


def _conv_changed_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv2(m.bn1(x))
    y.flatten(1).mul_(2.0)
    return y


Body = Callable[[Any, Tensor], Any]
CASES: list[tuple[str, str, Body]] = [
    ("fission", "frozen", lambda m, x: m.frozen(m.conv1(x))),
    ("fission", "functional, frozen", lambda m, x: F.batch_norm(x, m.bn1.running_mean, m.bn1.running_var)),
    ("fission", "other norms", lambda m, x: m.group(x) + m.instance(x) + F.layer_norm(x, x.shape[1:])),
    ("fission", "subclass", lambda m, x: m.own(m.conv1(x))),
    ("fission", "memory changed in place", _inplace_on_view),
    ("share-statistics", "one reader of each tensor", lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x))))),
    ("share-statistics", "concat along rows", lambda m, x: m.bn1(torch.cat([m.conv1(x), m.conv2(x)], 2))),
    ("share-statistics", "concat along the batch", lambda m, x: m.bn1(torch.cat([m.conv1(x), m.conv2(x)]))),
    ("share-statistics", "stack", lambda m, x: m.bn1(torch.stack([x, x], 1).flatten(0, 1))),
    ("fuse-statistics", "transposed", lambda m, x: m.bn1(m.up(x))),
    ("fuse-statistics", "reflecting", lambda m, x: m.bn1(m.reflecting(x))),
    ("fuse-statistics", "asymmetric padding", lambda m, x: m.bn1(m.uneven(x))),
    ("fuse-statistics", "asymmetric padding of a function", lambda m, x: m.bn1(F.conv2d(x, m.uneven.weight, padding="same"))),
    ("fuse-statistics", "parametrized", lambda m, x: m.bn1(m.norm(x))),
    ("fuse-statistics", "an activation between", lambda m, x: m.bn1(F.relu(m.conv1(x)))),
    ("fuse-statistics", "the input's own", lambda m, x: m.bn1(x)),
    ("fuse-statistics", "a pool between", lambda m, x: m.bn1(F.avg_pool2d(m.conv1(x), 2))),
    ("fuse-normalise", "no convolution reads it", lambda m, x: torch.tanh(m.bn1(m.conv1(x)))),
    ("fuse-normalise", "a mean over rows alone", lambda m, x: m.bn1(m.conv1(x)).mean((2,))),
    ("fuse-normalise", "a mean over channels", lambda m, x: m.bn1(m.conv1(x)).mean((1, 2))),
    ("fuse-normalise", "a mean in a dtype of its own", lambda m, x: m.bn1(m.conv1(x)).mean((2, 3), dtype=torch.float64)),
    ("fuse-normalise", "a mean that leaves a dimension", lambda m, x: m.bn3d(x.unsqueeze(2)).mean((2, 3))),
    ("fuse-normalise", "the output", lambda m, x: m.bn1(m.conv1(x))),
    ("fuse-normalise", "a convolution that pads by reflection", lambda m, x: m.reflecting(m.bn1(x))),
    ("fuse-normalise", "a transposed convolution", lambda m, x: m.up(m.bn1(x))),
    ("fuse-normalise", "an activation nothing knows", lambda m, x: m.conv2(torch.sigmoid(m.bn1(x)))),
    ("fuse-normalise", "the convolution's output is overwritten through a view", _conv_changed_through_a_view),
    ("fuse-normalise", "average pool that rounds up", lambda m, x: F.avg_pool2d(m.bn1(x), 2, ceil_mode=True)),
    ("fuse-normalise", "average pool with a divisor", lambda m, x: F.avg_pool2d(m.bn1(x), 2, divisor_override=3)),
    ("fuse-normalise", "average pool that leaves out padding", lambda m, x: F.avg_pool2d(m.bn1(x), 3, 1, 1, False, False)),
    ("fuse-normalise", "average pool into fixed sizes", lambda m, x: F.adaptive_avg_pool2d(m.bn1(x), 3)),
    ("fuse-normalise", "concat that no convolution reads", lambda m, x: torch.tanh(torch.cat([m.bn1(x), m.bn1(m.conv1(x))], 1))),
    ("fuse-normalise", "concat along rows", lambda m, x: m.conv2(torch.cat([m.bn1(x), m.bn1(m.conv1(x))], 2))),
    ("fuse-normalise", "max pool with dilation", lambda m, x: F.max_pool2d(m.bn1(x), 2, 1, 0, 2)),
    ("fuse-normalise", "max pool with indices", lambda m, x: F.max_pool2d(m.bn1(x), 2, return_indices=True)[0]),
    ("fuse-normalise", "bare activation with another reader", lambda m, x: (lambda z: m.conv1(z) + torch.tanh(z))(x.relu())),
    ("fuse-residual", "weighted sum", lambda m, x: torch.add(x, m.bn1(x), alpha=2)),
    ("fuse-residual", "difference", lambda m, x: x - m.bn1(x)),
    ("fuse-residual", "a number", lambda m, x: m.bn1(x) + 1.0),
    ("fuse-residual", "after an activation that is kept", lambda m, x: x + torch.tanh(m.bn1(x))),
    ("fuse-residual", "its normalised tensor is read elsewhere", lambda m, x: (lambda z: torch.tanh(z) + z + x)(m.bn1(x))),
    ("fuse-residual", "twice the same", lambda m, x: (lambda z: z + z)(m.bn1(x))),
    ("chain-readers", "one reader", lambda m, x: m.conv2(m.bn1(m.conv1(x)))),
    ("chain-readers", "readers that are not ours", lambda m, x: (lambda y: torch.tanh(y) + torch.sigmoid(y))(m.bn1(m.conv1(x)))),
    ("eliminate-concat", "along rows", lambda m, x: m.bn2(torch.cat([m.conv1(m.bn1(x)), m.conv2(x)], 2))),
    ("eliminate-concat", "nothing of it is written by a convolution", lambda m, x: m.bn1(torch.cat([x.exp(), x.tanh()], 1)[:, :4])),
    ("eliminate-concat", "one concat made twice", _made_twice),
    ("eliminate-concat", "twice the same", lambda m, x: (lambda y: torch.cat([y, y], 1))(m.conv2(m.bn1(x)))),
    ("eliminate-concat", "read elsewhere", lambda m, x: (lambda y: torch.cat([x, y], 1).sum() + y.exp())(m.conv2(m.bn1(x)))),
    ("fuse-join", "nothing reads the sum but the output", lambda m, x: F.relu(x + m.bn1(m.conv1(x)))),
    ("fuse-join", "a batch norm reads the sum", lambda m, x: m.conv2(m.bn2(x + m.bn1(m.conv1(x))))),
    ("fuse-join", "a plain convolution reads the sum", lambda m, x: m.conv2(x + m.bn1(m.conv1(x)))),
    ("fuse-join", "a pool reads the sum", lambda m, x: m.bn2(m.conv2(F.max_pool2d(F.relu(x + m.bn1(m.conv1(x))), 2)))),
    ("fuse-join", "added to itself", lambda m, x: (lambda y: m.bn2(m.conv2(F.relu(y + m.bn1(y)))))(m.conv1(x))),
    ("fuse-join", "an activation for one reader alone", lambda m, x: (lambda s: m.bn2(m.conv2(s.relu())) + s)(x + m.bn1(m.conv1(x)))),
    ("select-kernels", "nothing is fused", lambda m, x: m.frozen(m.conv1(x))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "why", "body"), CASES, ids=[f"{name}: {why}" for name, why, _ in CASES])
def test_must_not_fire(name: str, why: str, body: Body) -> None:
    model = _Parts(body)
    gm, _ = run_pass(model, prefix_before(name)[-1], *prefix_before(name)[:-1]) if prefix_before(name) else run_pass(model, name)
    before = graph_text(gm)
    gm, result = run_pass(model, name, *prefix_before(name))
    assert (result.modified, result.count) == (False, 0)
    assert graph_text(gm) == before
