"""Which kernels the fused convolutions of a rewritten graph will run, where the shapes of their inputs are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnrestructure.core.edges import ConvGeometry, Join, Transform
from bnrestructure.graph.ir import Conv
from bnrestructure.graph.provenance import provenance
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import ConvForward
from bnrestructure.kernels.folded import for_dimensions
from bnrestructure.kernels.folded.views import folded, image
from bnrestructure.kernels.layout import pitch_of
from bnrestructure.plan.plan import Kernel
from bnrestructure.plan.shapes import Shapes

__all__ = ["convolution_kernels", "planned_device"]


def planned_device(model: nn.Module, backend: str, inputs: tuple[Any, ...]) -> tuple[str | None, list[str]]:
    """(the type of device that kernels are planned for, what the user should know of that); None where the model is on several.

    backend "cuda" is planned for a GPU wherever the model is: nothing of it need be there.
    """
    devices = sorted({p.device.type for p in model.parameters()})
    if len(devices) > 1:
        return None, [f"the model is on {' and '.join(devices)}: its kernels are not planned"]
    device = devices[0] if devices else "cpu"
    if backend != "cuda" and device != "cuda":
        return device, []
    notes = ["on a GPU a kernel is proved before it is used, and rewritten steps are timed beside the model's own"]
    if device != "cuda":
        missing = registry.unavailable_reason("cuda")
        here = "" if missing is None else f" (here they cannot run: {missing})"
        notes.append(f"the model is on {device}, where backend 'cuda' means the reference; its kernels are planned for a GPU{here}")
    for x in inputs:
        if isinstance(x, Tensor) and x.dim() in (4, 5) and not pitch_of(folded(x, image)):
            notes.append(f"an input {list(x.shape)} of strides {list(x.stride())} is not channels_last: each step copies it first")
    return "cuda", notes


def convolution_kernels(path: str, after: fx.GraphModule, shapes: Shapes, backend: str, device: str) -> Iterator[Kernel]:
    """One entry for each fused convolution module of the region at ``path``, for a model on this type of device.

    The dtype is autocast's where that is on. Functional convolutions have no path to know their shapes by, and are left out.
    """
    modules = dict(after.named_modules(remove_duplicate=False))
    prefix = f"{path}." if path else ""
    for conv in Conv.every(after.graph):
        name = provenance(conv.node).module
        if name is None or prefix + name not in shapes or name not in modules:
            continue
        shape, dtype = shapes[prefix + name]
        weight = getattr(modules[name], "weight", None)
        if not isinstance(weight, Tensor):
            continue
        here = weight.device.type == device
        yield _kernel(prefix + name, conv, tuple(shape), tuple(weight.shape), dtype, backend, device, here)


def _kernel(
    name: str, conv: Conv, x: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype, backend: str, device: str, here: bool
) -> Kernel:
    geometry = ConvGeometry(conv.stride, conv.padding, conv.dilation, conv.groups)
    reason = registry.reason_for_device(backend, device)
    if reason is None and len(x) < len(weight):
        reason = "no batch dimension: PyTorch's convolution"
    if reason is None and here:
        reason = registry.unavailable_reason(device)
    if reason is None and min(*x, *geometry.output_size(x[2:], weight[2:])) < 1:
        reason = "an empty tensor"
    kernels = registry.implementation(device) if reason is None else None
    if kernels is None:
        reason = reason or f"this installation has no {device} kernels"
        return Kernel(name, x, "reference", reason, "reference", reason)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    call = _call(conv, torch.empty(x, dtype=dtype, device="meta"), torch.empty(weight, dtype=dtype, device="meta"), geometry)
    forward, backward = for_dimensions(kernels, len(x)).convolution_choices(call)
    return Kernel(name, x, *forward, *backward)


def _call(conv: Conv, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> ConvForward:
    """The kernel call of a node, on tensors of the meta device."""
    plain = Transform()
    if conv.forms_residual:  # then the product reads the sum as it is
        return ConvForward(x, plain, weight, None, geometry, x.dtype, join=Join(x, plain, x, plain, conv.act))
    vector = torch.empty(x.shape[1], device="meta") if conv.mean is not None else None
    gate = torch.empty(x.shape[:2], device="meta") if conv.gate is not None else None
    return ConvForward(x, Transform(vector, vector, vector, conv.act, gate), weight, None, geometry, x.dtype)
