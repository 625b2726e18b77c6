"""Each rewrite on the smallest graph that has it, the lines before and after; and how many rewrites each pass makes of the small models.

``pytest tests/passes --regenerate-golden`` writes tests/golden/passes/ anew; read the difference before committing it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pass_tools import after, graph_text, make_pass, prefix_before
from small_models import SMALL_MODELS, build
from torch import Tensor, nn
from torch.nn import functional as F

from bnrestructure.passes.pipeline import PASSES

_GOLDEN = Path(__file__).parent.parent / "golden" / "passes"

Body = Callable[[Any, Tensor], Any]


class _Layers(nn.Module):
    """A few layers of 4 channels under short names; a body, a function of the module and its input, is the forward."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.conv, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))
        self.wide, self.wider = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(12, 4, 1, bias=False)
        self.bn, self.bn2, self.bn3 = (nn.BatchNorm2d(4, affine=False, track_running_stats=False) for _ in range(3))
        self.bn8, self.bn12 = (nn.BatchNorm2d(n, affine=False, track_running_stats=False) for n in (8, 12))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _split(m: Any, x: Tensor) -> Any:
    one, other = F.relu(m.bn8(torch.cat([x, x.exp()], 1))).chunk(2, 1)
    return m.conv(one), other


def _gated(m: Any, x: Tensor) -> Tensor:
    z = F.silu(m.bn(x))
    return m.conv2(z * m.conv(F.adaptive_avg_pool2d(z, 1)).sigmoid())


def _gated_alone(m: Any, x: Tensor) -> Tensor:
    z = m.bn(x)
    return z * m.conv(z.mean((2, 3), keepdim=True)).sigmoid().expand_as(z)


def _growing(m: Any, x: Tensor) -> Tensor:
    a = m.conv2(m.bn2(m.conv(m.bn(x))))
    b = m.conv3(m.bn3(m.wide(m.bn8(torch.cat([x, a], 1)))))
    return m.wider(m.bn12(torch.cat([x, a, b], 1)))


def _growing_and_returned(m: Any, x: Tensor) -> Any:
    a = m.conv2(m.bn2(m.conv(m.bn(x))))
    b = m.conv3(m.bn3(m.wide(m.bn8(torch.cat([x, a], 1)))))
    c = m.wider(m.bn12(torch.cat([x, a, b], 1)))
    return torch.cat([x, a, b, c], 1)


def _forked(m: Any, x: Tensor, *others: Callable[[Tensor], Tensor]) -> Any:
    y = m.conv(x)
    return [m.bn2(m.conv2(y)), m.bn3(m.conv3(y)), *(other(y) for other in others)]


def _unshared(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.bn2(m.conv2(y)), m.bn3(m.conv3(x)) + y


#: For each pass: its rewrites, by what they are about.
REWRITES: dict[str, dict[str, Body]] = {
    "fission": {"a batch norm": lambda m, x: m.bn(x)},
    "share-statistics": {
        "of a concat, those of its segments": lambda m, x: m.bn8(torch.cat([x, x.exp()], 1)),
        "of a tensor that two batch norms read": lambda m, x: m.bn(x) * m.bn2(x),
        "of a concat that grows": _growing,
    },
    "fuse-statistics": {"of a convolution": lambda m, x: m.bn(m.conv(x))},
    "fuse-normalise": {
        "an activation": lambda m, x: F.relu(m.bn(x)),
        "a concat": lambda m, x: m.wide(torch.cat([m.bn(x), m.bn2(x.exp())], 1)),
        "a split": _split,
        "squeeze-excite": _gated,
        "squeeze-excite that no convolution reads": _gated_alone,
        "a convolution": lambda m, x: m.conv(m.bn(x)),
        "a bare activation": lambda m, x: m.conv(F.relu(x)),
        "a max pool": lambda m, x: F.max_pool2d(m.bn(x), 2),
        "an average pool": lambda m, x: F.avg_pool2d(m.bn(x), 2),
        "a global average": lambda m, x: m.bn(x).mean((2, 3)),
    },
    "fuse-residual": {
        "an identity shortcut": lambda m, x: F.relu(m.bn(m.conv(x)) + x),
        "a shortcut with a batch norm": lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv2(x)),
        "an activation in the readers": lambda m, x: m.conv2(F.relu(m.bn(m.conv(x)) + x)),
        "statistics of the sum": lambda m, x: m.bn2(m.bn(m.conv(x)) + x),
        "statistics of a sum without a batch norm": lambda m, x: m.bn2(m.conv(m.bn(x)) + x),
        "a branch that is activated before it is added": lambda m, x: F.silu(m.bn(m.conv(x))) + x,
        "a branch that squeeze-excite gates": lambda m, x: F.relu(_gated_alone(m, x) + x),
        "a ReLU behind a sum without a batch norm": lambda m, x: F.relu(m.conv(m.bn(x)) + x),
    },
    "chain-readers": {
        "two convolutions": _forked,
        "a reader that is none of ours": lambda m, x: _forked(m, x, torch.tanh),
        "a residual at the end": lambda m, x: (lambda y: m.bn3(m.conv3(m.bn2(m.conv2(y)))) + y)(m.conv(x)),
        "a gradient that cannot be shared": _unshared,
    },
    "eliminate-concat": {
        "a dense block": _growing,
        "a dense block that is returned": _growing_and_returned,
        "branches": lambda m, x: torch.cat([m.conv(m.bn(x)), m.conv2(m.bn2(x.exp()))], 1),
        "a branch beside a plain convolution": lambda m, x: torch.cat([m.conv(x), m.conv2(m.bn2(x.exp()))], 1),
    },
    "fuse-join": {"the first reader of the sum": lambda m, x: m.bn2(m.conv2(F.relu(m.bn(m.conv(x)) + x)))},
    "select-kernels": {
        "a batch norm that fission split for nothing": lambda m, x: torch.tanh(m.bn(x)),
        "statistics that one batch norm reads": lambda m, x: m.conv2(m.bn(m.conv(x))),
    },
}


def _compare(name: str, text: str, request: pytest.FixtureRequest) -> None:
    path = _GOLDEN / f"{name}.txt"
    if request.config.getoption("--regenerate-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", PASSES)
def test_rewrites(name: str, request: pytest.FixtureRequest) -> None:
    """The lines that a pass takes away and puts in their place, behind what the passes before it did."""
    parts = []
    for about, body in REWRITES[name].items():
        gm = after(_Layers(body), *prefix_before(name))
        before = graph_text(gm)
        assert make_pass(name)(gm).modified, about
        changed = difflib.unified_diff(before.splitlines(), graph_text(gm).splitlines(), n=0, lineterm="")
        lines = [line for line in changed if not line.startswith(("---", "+++", "@@"))]
        parts.append("\n".join([f"{about}:", *lines, ""]))
    _compare(name, "\n".join(parts), request)


def test_counts(request: pytest.FixtureRequest) -> None:
    """Rewrites and nodes of every pass on every small model."""
    lines = []
    for model_name in SMALL_MODELS:
        gm = after(build(model_name))
        for name in PASSES:
            nodes = len(gm.graph.nodes)
            count = make_pass(name)(gm).count
            lines.append(f"{model_name:<16} {name:<18} {count:>3} rewrites, {nodes:>3} -> {len(gm.graph.nodes):>3} nodes")
    _compare("counts", "\n".join(lines) + "\n", request)


@pytest.mark.parametrize("model_name", ["residual", "dense"])
def test_whole_models(model_name: str, request: pytest.FixtureRequest) -> None:
    """Two models after the whole pipeline."""
    _compare(f"{model_name}-model", graph_text(after(build(model_name), *PASSES)) + "\n", request)
