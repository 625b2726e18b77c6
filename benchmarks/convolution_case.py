"""A convolution node with random arguments, for the benchmarks of single nodes: its calls, and whether their numbers are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Transform
from bnrestructure.kernels.calls import ConvBackward, ConvForward
from bnrestructure.kernels.reference import REFERENCE
from bnrestructure.kernels.reference.elementwise import affine


@dataclass(frozen=True)
class Node:
    """A convolution in its network; ``pitch``: channels of the concat buffers that hold x and that dx is added to."""

    name: str
    channels: int
    channels_out: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    act: str = "relu"
    pitch: int = 0
    affine: bool = True


def image(batch: int, channels: int, size: int, dtype: torch.dtype, pitch: int = 0) -> Tensor:
    """A random channels_last activation, or the first channels of a wider one."""
    x = torch.randn(batch, max(channels, pitch), size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)[:, :channels]


class Case:
    """A node's tensors at a batch size, in float32 or bfloat16 (the weight in float32)."""

    def __init__(self, node: Node, batch: int, dtype: torch.dtype) -> None:
        c, pad = node.channels, node.kernel // 2
        self.name, self.dtype = node.name, dtype
        self.geometry = ConvGeometry((node.stride,) * 2, (pad,) * 2, (1, 1), node.groups)
        self.x = image(batch, c, node.size, dtype, node.pitch)
        weight = torch.randn(node.channels_out, c // node.groups, node.kernel, node.kernel)
        self.weight = (weight / weight[0].numel() ** 0.5).contiguous(memory_format=torch.channels_last)
        mean, scale, beta = torch.randn(c) / 10, torch.rand(c) + 0.5, torch.randn(c) / 10
        self.transform = Transform(mean, scale, beta, node.act) if node.affine else Transform()
        if node.affine:  # none within rounding of the activation's kink: there the mask may fall either way
            self.x[affine(self.x, self.transform).abs() < 1e-4] += 0.1
        size_out = (node.size + 2 * pad - node.kernel) // node.stride + 1
        self.p, y = (image(batch, node.channels_out, size_out, dtype) for _ in range(2))
        self.edge = BackwardEdge(*torch.rand(3, node.channels_out), y, torch.rand(node.channels_out))
        self.into = image(batch, c, node.size, dtype, node.pitch) if node.pitch else None
        self.needs = (c != 3, True, False)

    def forward(self, run: Callable[[Any], Any]) -> Callable[[], Any]:
        """The forward pass by ``run``, which takes a kernel call."""
        call = ConvForward(self.x, self.transform, self.weight, None, self.geometry, self.dtype, True)
        return lambda: run(call)

    def backward(self, run: Callable[[Any], Any], *, accumulate: bool = True) -> Callable[[], Any]:
        """The backward pass by ``run``; where the node has a pitch, dx is added to a buffer unless forbidden."""
        into = self.into if accumulate else None
        call = ConvBackward(self.p, self.edge, self.x, self.transform, self.weight, self.geometry, self.dtype, self.needs, into)
        return lambda: run(call)

    def check(self, forwards: list[Callable[[], Any]], backwards: list[Callable[[], Any]]) -> None:
        """Raise AssertionError where a result is not the reference's; backward calls must not accumulate."""
        limit = 1e-4 if self.dtype is torch.float32 else 2e-2
        expected = self.forward(REFERENCE.run)(), self.backward(REFERENCE.run, accumulate=False)()
        for runs, truth in zip((forwards, backwards), expected, strict=True):
            for run in runs:
                for found, right in zip(run(), truth, strict=True):
                    if right is not None:
                        error = ((found.double() - right.double()).norm() / right.double().norm()).item()
                        assert error < limit, f"{self.name}: relative error {error:.1e}"
