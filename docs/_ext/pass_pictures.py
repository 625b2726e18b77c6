"""The graph of a small model before and after each pass, drawn by the project's own pass pipeline: pictures that cannot go stale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnrestructure.capture.regions import Options
from bnrestructure.passes.pipeline import PASSES
from bnrestructure.plan.plan import Plan
from bnrestructure.plan.survey import take_survey
from bnrestructure.report.graph_html import compared
from bnrestructure.report.graph_panes import Pane

__all__ = ["PICTURED", "pictures"]


def _conv(channels: int, out: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)


class Chain(nn.Module):
    """conv, BN, ReLU, conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.relu, self.conv2 = _conv(16, 32), nn.BatchNorm2d(32), nn.ReLU(), _conv(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn(self.conv1(x))))


class Residual(nn.Module):
    """The end of a residual block, and the convolution that begins the next."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = _conv(32, 32), nn.BatchNorm2d(32), _conv(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn1(self.conv1(x)) + x))


class Dense(nn.Module):
    """Two layers of a dense block and what reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32)
        self.norm1, self.layer1 = nn.BatchNorm2d(32), _conv(32, 16)
        self.norm2, self.layer2 = nn.BatchNorm2d(48), _conv(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.layer1(F.relu(self.norm1(x)))
        return self.layer2(F.relu(self.norm2(torch.cat([x, y], 1))))


class Fork(nn.Module):
    """One tensor, read by two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = _conv(3, 32), nn.BatchNorm2d(32)
        self.left, self.right = _conv(32, 16, 1), _conv(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.relu(self.norm(self.stem(x)))
        return self.left(z), self.right(z)


class Lonely(nn.Module):
    """A batch norm without neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(16), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


_SHAPE = (16, 16, 56, 56)
_IMAGE = (16, 3, 56, 56)
_WIDE = (16, 32, 56, 56)
#: pass -> (model, shape of its input)
PICTURED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fission": (Chain, _SHAPE),
    "share-statistics": (Dense, _IMAGE),
    "fuse-statistics": (Chain, _SHAPE),
    "fuse-normalise": (Chain, _SHAPE),
    "fuse-residual": (Residual, _WIDE),
    "chain-readers": (Fork, _IMAGE),
    "eliminate-concat": (Dense, _IMAGE),
    "fuse-join": (Residual, _WIDE),
    "select-kernels": (Lonely, _SHAPE),
}


def pictures() -> dict[str, str]:
    """pass -> HTML with both graphs: after the passes before it, and after it as well. ``whole`` is a chain before and after everything."""
    made = {}
    for name, (model, shape) in PICTURED.items():
        i = PASSES.index(name)
        before, after = (_graph(model(), PASSES[:j], shape) for j in (i, i + 1))
        made[name] = _beside(before, after, f"before {name}", f"after {name}")
    before, after = _panes(Chain(), PASSES, _SHAPE)
    made["whole"] = _beside(before, after, "before", "after")
    return made


def _graph(model: nn.Module, passes: tuple[str, ...], shape: tuple[int, ...]) -> Pane:
    return _panes(model, passes, shape)[1]


def _panes(model: nn.Module, passes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[Pane, Pane]:
    inputs = (torch.empty(shape),)
    return compared(take_survey(model, Options("auto", passes), inputs), Plan(type(model).__name__))


_TIP = (
    '<svg width="0" height="0" style="position:absolute"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
    'markerHeight="7" orient="auto"><path class="tip" d="M0 0 8 4 0 8z"/></marker></defs></svg>'
)


def _beside(before: Pane, after: Pane, *titles: str) -> str:
    parts = [_TIP, '<div class="graphs">']
    for title, pane in zip(titles, (before, after), strict=True):
        size = f'viewBox="-2 -2 {pane.width + 4:.0f} {pane.height + 4:.0f}" width="{pane.width + 4:.0f}"'
        parts.append(f'<figure><figcaption>{title}</figcaption><svg {size} role="img" aria-label="{title}">{pane.elements}</svg></figure>')
    return "\n".join([*parts, "</div>", ""])
