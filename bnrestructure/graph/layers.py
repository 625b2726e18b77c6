"""Which layer with parameters a node of a captured graph calls: a convolution or a batch norm, whichever way the model spelt it.

Module calls are recognised by *exact* type and functional calls by target, and both give the same description. A parameter is referred
to by its attribute path (module form) or by its node (functional form); :func:`reference` turns either into a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnrestructure.core.plain import plain
from bnrestructure.graph.boundaries import boundary_reason
from bnrestructure.graph.provenance import guarded_tensor, provenance

__all__ = [
    "BatchNormLayer",
    "ConvLayer",
    "Number",
    "Parameter",
    "arguments_of",
    "batch_norm_of",
    "conv_of",
    "input_of",
    "is_depthwise",
    "module_of",
    "per_dimension",
    "reference",
    "shape_of",
]

#: An attribute path from the graph's root, a node, or None.
Parameter = str | fx.Node | None
#: A number, or the node that computes it: torch.compile makes arguments of a model's numbers where shapes are dynamic.
Number = float | fx.Node


@dataclass(frozen=True)
class ConvLayer:
    """A convolution call, ``node``. Per-dimension parameters are tuples; padding is zeros."""

    node: fx.Node
    input: fx.Node
    weight: Parameter
    bias: Parameter
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    out_channels: int | None  # None where the weight is computed in the graph


@dataclass(frozen=True)
class BatchNormLayer:
    """A batch norm call, ``node``, that uses batch statistics. ``process_group`` is set for SyncBatchNorm alone."""

    node: fx.Node
    input: fx.Node
    weight: Parameter
    bias: Parameter
    running_mean: Parameter
    running_var: Parameter
    num_batches_tracked: Parameter
    momentum: Number | None
    eps: Number
    process_group: Parameter = None
    synchronised: bool = False
    dimensions: tuple[int, ...] = ()  # of the input, as the layer checks them; empty where it checks nothing


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls; None for other nodes."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    try:
        return owner.get_submodule(str(node.target))
    except AttributeError:
        return None


def input_of(node: fx.Node) -> fx.Node | None:
    """The first argument of a call, if it is a node of the graph."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def reference(parameter: Parameter, before: fx.Node) -> fx.Node | None:
    """A node that reads the parameter, inserted before ``before`` if it has to be made."""
    if not isinstance(parameter, str):
        return parameter
    with before.graph.inserting_before(before):
        return before.graph.create_node("get_attr", parameter)


def arguments_of(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    """A functional call's arguments by name, whether given by position, by keyword or not at all."""
    values = dict(defaults)
    values.update(zip(names, node.args, strict=False))
    values.update(node.kwargs)
    return values


def per_dimension(value: Any, dimensions: int) -> tuple[int, ...] | None:
    """One int for each dimension from what convolutions and pools take, or None where it is not made of ints."""
    if isinstance(value, int):
        return (value,) * dimensions
    if isinstance(value, tuple | list) and all(isinstance(v, int) for v in value):
        return tuple(value) * (dimensions if len(value) == 1 else 1)
    return None


_CONV_MODULES: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_CONV_FUNCTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _padding(given: Any, kernel: tuple[int, ...] | None, dilation: tuple[int, ...] | None, dimensions: int) -> tuple[int, ...] | str | None:
    """The padding of each dimension from what convolutions take; a reason where kernels know none such; None where it is computed."""
    if given != "same" or dilation is None:
        return per_dimension(0 if given == "valid" else given, dimensions)
    if kernel is None:
        return "the convolution's padding='same' is of a weight that is computed in the graph"
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(t % 2 for t in total):
        return "the convolution pads asymmetrically (padding='same' with an even kernel)"
    return tuple(t // 2 for t in total)


def conv_of(node: fx.Node) -> ConvLayer | str | None:
    """The convolution that this node calls; a reason why a convolution cannot be fused; or None when it is something else."""
    module = module_of(node)
    layer: ConvLayer | str
    if isinstance(module, nn.modules.conv._ConvNd):
        layer = _conv_module(node, module)
    elif node.op == "call_function" and node.target in _CONV_FUNCTIONS:
        layer = _conv_function(node, _CONV_FUNCTIONS[node.target])
    else:
        return None
    changed_by = provenance(node).changed_by
    return layer if changed_by is None else f"of its convolution: {changed_by} changes its output in place"


def _conv_module(node: fx.Node, module: nn.modules.conv._ConvNd) -> ConvLayer | str:
    reason = boundary_reason(module)
    if reason is not None:
        return f"of its convolution: {reason}"
    if type(module) not in _CONV_MODULES:
        return f"the convolution is a {type(module).__name__}"
    if module.padding_mode != "zeros":
        return f"the convolution pads with padding_mode={module.padding_mode!r}"
    source = input_of(node)
    if source is None:
        return "the convolution's input is not a tensor of the graph"
    dimensions = _CONV_MODULES[type(module)]
    stride, dilation = (per_dimension(given, dimensions) for given in (module.stride, module.dilation))
    padding = _padding(module.padding, module.kernel_size, dilation, dimensions)
    if isinstance(padding, str):
        return padding
    if stride is None or padding is None or dilation is None:
        return "the convolution's stride, padding, dilation or groups are computed in the graph"
    path = str(node.target)
    return ConvLayer(
        node=node,
        input=source,
        weight=f"{path}.weight",
        bias=None if module.bias is None else f"{path}.bias",
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=module.groups,
        out_channels=module.out_channels,
    )


def _conv_function(node: fx.Node, dimensions: int) -> ConvLayer | str:
    values = arguments_of(node, _CONV_NAMES, {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    weight = values["weight"]
    shape = shape_of(weight) if isinstance(weight, fx.Node) else None
    stride, dilation = (per_dimension(values[k], dimensions) for k in ("stride", "dilation"))
    padding = _padding(values["padding"], None if shape is None else shape[2:], dilation, dimensions)
    if isinstance(padding, str):
        return padding
    if stride is None or padding is None or dilation is None or not isinstance(values["groups"], int):
        return "the convolution's stride, padding, dilation or groups are computed in the graph"
    if not isinstance(values["input"], fx.Node) or not isinstance(weight, fx.Node):
        return "the convolution's input or weight is not a tensor of the graph"
    return ConvLayer(
        node, values["input"], weight, values["bias"], stride, padding, dilation, values["groups"], None if shape is None else shape[0]
    )


def is_depthwise(weight: tuple[int, ...] | None, groups: int) -> bool:
    """Whether each group of a convolution reads a single channel; ``weight`` is its weight's shape where that is known."""
    return weight is not None and groups > 1 and weight[1] == 1


def shape_of(parameter: fx.Node) -> tuple[int, ...] | None:
    """The shape of a parameter or buffer of the model, of which this node is a read; None where it is computed in the graph."""
    known = guarded_tensor(parameter)
    if known is not None:
        return tuple(known.shape)
    if parameter.op == "get_attr":
        owner: Any = parameter.graph.owning_module
        for atom in str(parameter.target).split("."):
            owner = getattr(owner, atom, None)
        return tuple(owner.shape) if isinstance(owner, torch.Tensor) else None
    return None


_BATCH_NORM_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_BATCH_NORM_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def batch_norm_of(node: fx.Node) -> BatchNormLayer | str | None:
    """The batch norm that this node calls; a reason why it is left alone; or None when it is something else."""
    if node.op == "call_module":
        module = module_of(node)
        return _batch_norm_module(node, module) if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
    if node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm):
        return _batch_norm_function(node)
    return None


def _batch_norm_module(node: fx.Node, module: nn.modules.batchnorm._BatchNorm) -> BatchNormLayer | str:
    reason = boundary_reason(module)
    if reason is not None:
        return reason
    kind = type(module)
    if kind not in _BATCH_NORM_MODULES:
        return f"{kind.__name__} is not one of PyTorch's batch norm layers"
    if not module.training and module.running_mean is not None:
        return "frozen: it is in eval mode and normalises with its running statistics"
    source = input_of(node)
    if source is None:
        return "its input is not a tensor of the graph"
    momentum, eps = plain(module.momentum), plain(module.eps)
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, int | float | None):
            return f"its {name} is a {type(value).__name__}"
    path = str(node.target)

    def parameter(name: str) -> Parameter:
        return None if getattr(module, name) is None else f"{path}.{name}"

    updates = module.training and module.track_running_stats
    return BatchNormLayer(
        node=node,
        input=source,
        weight=parameter("weight"),
        bias=parameter("bias"),
        running_mean=parameter("running_mean") if updates else None,
        running_var=parameter("running_var") if updates else None,
        num_batches_tracked=parameter("num_batches_tracked") if updates else None,
        momentum=momentum,
        eps=eps,
        process_group=parameter("process_group") if kind is nn.SyncBatchNorm else None,
        synchronised=kind is nn.SyncBatchNorm,
        dimensions=_DIMENSIONS.get(kind, ()),
    )


def _batch_norm_function(node: fx.Node) -> BatchNormLayer | str:
    if node.target is torch.batch_norm:
        names: tuple[str, ...] = (
            "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled",
        )  # fmt: skip
    else:
        names = _BATCH_NORM_NAMES
    values = arguments_of(node, names, {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5})
    if values["training"] is not True:
        return "frozen: batch_norm is called with training=False"
    if not isinstance(values["input"], fx.Node):
        return "its input is not a tensor of the graph"
    return BatchNormLayer(
        node, values["input"], values["weight"], values["bias"], values["running_mean"], values["running_var"], None,
        values["momentum"], values["eps"],
    )  # fmt: skip
