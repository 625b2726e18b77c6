"""The convolution nodes of benchmarks/gpu: shapes of real networks, checked against fp64; kernels.py times them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels import join
from bnrestructure.kernels.calls import ConvBackward, ConvForward, JoinForward
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.cuda.device import uses_tf32
from bnrestructure.kernels.proof.check import FACTOR, distance, poisoned
from bnrestructure.kernels.reference import REFERENCE

__all__ = ["NODES", "RAGGED", "Node", "check_node", "compared", "distance", "draw", "implementation", "implementations", "poisoned"]


@dataclass(frozen=True)
class Node:
    """A fused convolution in its network: kernel x kernel, same padding, square images. ``joined``: its input is a residual join's
    sum, which it forms itself."""

    name: str
    channels: int
    out: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    act: str = "relu"
    gated: bool = False
    joined: bool = False

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry((self.stride,) * 2, (self.kernel // 2,) * 2, (1, 1), self.groups)

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1


NODES = (
    Node("densenet 1x1 256->128 56", 256, 128, 56),
    Node("densenet 1x1 512->128 28", 512, 128, 28),
    Node("densenet 1x1 1024->128 7", 1024, 128, 7),
    Node("densenet 3x3 128->32 56", 128, 32, 56, 3),
    Node("densenet 3x3 128->32 14", 128, 32, 14, 3),
    Node("densenet transition 512->256 28", 512, 256, 28),
    Node("resnet 1x1 64->256 56", 64, 256, 56),
    Node("resnet 1x1 1024->256 14", 1024, 256, 14),
    Node("resnet join 1x1 256->64 56", 256, 64, 56, joined=True),
    Node("resnet join 1x1 1024->256 14", 1024, 256, 14, joined=True),
    Node("resnet join 3x3 64->64 56", 64, 64, 56, 3, joined=True),
    Node("mobilenet join 1x1 32->192 28", 32, 192, 28, act="identity", joined=True),
    Node("resnet 1x1 256->512 56 stride 2", 256, 512, 56, stride=2, act="identity"),
    Node("resnet 3x3 64->64 56", 64, 64, 56, 3),
    Node("resnet 3x3 256->256 28 stride 2", 256, 256, 28, 3, 2),
    Node("resnext 3x3 128->128 56 groups 32", 128, 128, 56, 3, groups=32),
    Node("mobilenet 1x1 96->24 56", 96, 24, 56, act="relu6"),
    Node("mobilenet depthwise 144 56", 144, 144, 56, 3, groups=144, act="relu6"),
    Node("mobilenet depthwise 576 14 stride 2", 576, 576, 14, 3, 2, groups=576, act="relu6"),
    Node("efficientnet depthwise 5x5 240 28", 240, 240, 28, 5, groups=240, act="silu"),
    Node("efficientnet 1x1 gate 240->40 28", 240, 40, 28, act="silu", gated=True),
)

#: Shapes that nothing fits, for the check alone.
RAGGED = (
    Node("1x1 37->19", 37, 19, 13),
    Node("3x3 17->70 stride 2", 17, 70, 15, 3, 2),
    Node("5x5 3->33 gelu", 3, 33, 11, 5, act="gelu"),
    Node("7x7 3->64 stride 2", 3, 64, 37, 7, 2, act="leaky_relu(0.1)"),
    Node("3x3 groups 30->20", 30, 20, 9, 3, groups=10, act="hardswish"),
    Node("1x1 130->5 stride 3 gelu_tanh", 130, 5, 14, 1, 3, act="gelu_tanh"),
    Node("join 1x1 37->19 gelu", 37, 19, 13, act="gelu", joined=True),
    Node("join 3x3 17->70 stride 2", 17, 70, 15, 3, 2, joined=True),
    Node("depthwise 7x7 21", 21, 21, 10, 7, groups=21, act="silu"),
)


@dataclass
class Inputs:
    """What a node's forward and backward take."""

    x: Tensor
    transform: Transform
    weight: Tensor
    dy: Tensor
    edge: BackwardEdge
    before: Tensor
    r: Tensor

    @property
    def join(self) -> Join:
        """For a node that is joined: x is the branch, r the shortcut as it is."""
        return Join(self.x, self.transform._replace(act="identity"), self.r, Transform(), self.transform.act)

    def forward(self, kernels: Any, node: Node, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(y, mean, var); of a joined node the sum before them."""
        if not node.joined:
            return kernels.run(ConvForward(self.x, self.transform, self.weight, None, node.geometry, dtype, True))
        z = kept_activation(self.x.shape, dtype, self.x.device)
        return z, *kernels.run(ConvForward(z, Transform(), self.weight, None, node.geometry, dtype, True, join=self.join))

    def backward(self, kernels: Any, node: Node, dtype: torch.dtype, accumulate: Tensor) -> ConvGradients:
        """All gradients, dx added to ``accumulate``."""
        x, transform, join = (self.sum, Transform(), self.join) if node.joined else (self.x, self.transform, None)
        needs = True, True, False
        return kernels.run(
            ConvBackward(self.dy, self.edge, x, transform, self.weight, node.geometry, dtype, needs, accumulate, join)
        )  # fmt: skip

    @cached_property
    def sum(self) -> Tensor:
        """The join's sum, which backward is given."""
        return REFERENCE.run(JoinForward(self.join, self.x.dtype)).z

    def double(self) -> Inputs:
        t, e = self.transform, self.edge
        return Inputs(
            self.x.double(), Transform(*map(_double, (t.mean, t.scale, t.beta)), t.act, _double(t.gate)),
            self.weight.double(), self.dy.double(), BackwardEdge(*map(_double, (e.s, e.a, e.b, e.y, e.mean))),
            self.before.double(), self.r.double(),
        )  # fmt: skip


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def draw(node: Node, batch: int, dtype: torch.dtype, device: str) -> Inputs:
    """Fresh inputs, the channels' means away from zero."""

    def pixels(c: int, size: int) -> Tensor:
        x = torch.randn(batch, c, size, size, device=device) + 2 * torch.randn(1, c, 1, 1, device=device)
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def vector(c: int, spread: float) -> Tensor:
        return torch.randn(c, device=device) * spread

    x, y = pixels(node.channels, node.size), pixels(node.out, node.out_size)
    gate = torch.rand(batch, node.channels, device=device) if node.gated else None
    transform = Transform(
        x.float().mean((0, 2, 3)), 1 + vector(node.channels, 0.2), vector(node.channels, 1.0), node.act, gate
    )
    weight = torch.randn(node.out, node.channels // node.groups, node.kernel, node.kernel, device=device).to(dtype)
    edge = BackwardEdge(
        1 + vector(node.out, 0.2), vector(node.out, 0.1), vector(node.out, 0.1), y, y.float().mean((0, 2, 3))
    )
    weight = weight.contiguous(memory_format=torch.channels_last)
    return Inputs(x, transform, weight, torch.randn_like(y), edge, torch.randn_like(x), torch.randn_like(x))


def check_node(node: Node, dtype: torch.dtype, device: str = "cuda", batch: int = 4) -> dict[str, Any]:
    """Errors against fp64 of both implementations and of the reference in the same dtype, and whether ours are as small."""
    a = draw(node, batch, dtype, device)
    wide = a.double()

    def results(kernels: Any, inputs: Inputs, compute: torch.dtype) -> list[Tensor]:
        gradients = inputs.backward(kernels, node, compute, inputs.before.clone())
        return [t for t in (*inputs.forward(kernels, node, compute), *gradients) if t is not None]

    truth, theirs = results(REFERENCE, wide, torch.float64), results(REFERENCE, a, dtype)
    # One rounding is granted where the reference is exact by luck.
    unit = 2**-10 if dtype == torch.float32 and uses_tf32() else torch.finfo(dtype).eps
    found: dict[str, Any] = {"ok": True}
    for name in implementations(node):
        with poisoned():
            ours = results(implementation(node, name), a, dtype)
        found[name] = compared(ours, theirs, truth, unit)
        found["ok"] = found["ok"] and found[name]["ok"]
    return found


def implementations(node: Node) -> tuple[str, ...]:
    """What can run the node: the fused kernels, and the hybrid unless there is a gate.

    Behind a join each of them finishes it, and "in turn" is the join's own sweep beside the convolution that the rule picks.
    """
    return ("fused", "hybrid", "in turn") if node.joined else ("fused",) if node.gated else ("fused", "hybrid")


def implementation(node: Node, name: str) -> Any:
    """The kernels that run the node in this way."""
    if name != "in turn":
        depthwise = name == "fused" and node.groups == node.channels
        return KERNELS.convolutions.by("depthwise" if depthwise else name)

    def run(call: ConvForward | ConvBackward) -> Any:
        in_turn: Any = join.forward_in_turn if isinstance(call, ConvForward) else join.backward_in_turn
        return in_turn(KERNELS, KERNELS.run, call)

    return SimpleNamespace(run=run)


def compared(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor], unit: float) -> dict[str, Any]:
    """Both distances from the truth, and whether ours are within FACTOR of theirs (or of one rounding, ``unit``)."""
    own = [distance(t, true) for t, true in zip(ours, truth, strict=True)]
    other = [distance(t, true) for t, true in zip(theirs, truth, strict=True)]
    fine = all(e <= FACTOR * max(r, unit) for e, r in zip(own, other, strict=True))
    return {"ok": fine, "errors": own, "reference_errors": other}
