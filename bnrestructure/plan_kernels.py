"""Which kernels the fused convolutions of a rewritten graph will run, where the shapes of their inputs are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from bnrestructure import ops
from bnrestructure.graph.layers import modules_of
from bnrestructure.kernels import registry
from bnrestructure.ops.edges import ConvGeometry, Transform
from bnrestructure.plan import Kernel

__all__ = ["Shapes", "convolution_kernels"]

#: Path of a layer -> shape and dtype of its input.
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def convolution_kernels(path: str, after: fx.GraphModule, shapes: Shapes, backend: str) -> Iterator[Kernel]:
    """One entry for each fused convolution module of the region at ``path``, for a model on the CPU.

    The dtype is autocast's where that is on. Functional convolutions have no path to know their shapes by, and are left out.
    """
    modules = modules_of(after)
    prefix = f"{path}." if path else ""
    for node in after.graph.nodes:
        name = node.meta.get("bnr_module")
        if node.target is not ops.conv or prefix + str(name) not in shapes or str(name) not in modules:
            continue
        shape, dtype = shapes[prefix + str(name)]
        weight: Any = modules[str(name)].weight
        yield _kernel(prefix + str(name), node, tuple(shape), tuple(weight.shape), dtype, backend)


def _kernel(
    name: str, node: fx.Node, x: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype, backend: str
) -> Kernel:
    of: dict[str, Any] = dict(node.kwargs)
    stride, padding, dilation = (tuple(of[key]) for key in ("stride", "padding", "dilation"))
    geometry = ConvGeometry(stride, padding, dilation, of["groups"])
    reason = "the reference backend was asked for" if backend == "reference" else registry.unavailable_reason("cpu")
    if reason is None and min(*x, *geometry.output_size(x[2:], weight[2:])) < 1:
        reason = "an empty tensor"
    if reason is not None:
        return Kernel(name, x, "reference", reason, "reference", reason)
    from bnrestructure.kernels import cpu

    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    rides = torch.empty(0) if of["mean"] is not None else None
    gate = torch.empty(x[:2], device="meta") if of["gate"] is not None else None
    transform = Transform(rides, rides, rides, str(of["act"]), gate)
    forward, backward = cpu.convolution_choices(x, weight, transform, geometry, dtype)
    return Kernel(name, x, *forward, *backward)
