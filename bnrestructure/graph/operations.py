"""Which operation without parameters a node of a captured graph is: an activation, a sum, a concat or a pool, however spelt."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnrestructure.core.activation import leaky_relu_name
from bnrestructure.graph.boundaries import boundary_reason
from bnrestructure.graph.layers import arguments_of, per_dimension

__all__ = ["GlobalAverage", "activation_of", "add_of", "avg_pool_of", "concat_of", "global_average_of", "max_pool_of"]

_PLAIN_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", F.relu: "relu", torch.relu: "relu", "relu": "relu",
    nn.ReLU6: "relu6", F.relu6: "relu6",
    nn.SiLU: "silu", F.silu: "silu",
    nn.Hardswish: "hardswish", F.hardswish: "hardswish",
}  # fmt: skip


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, fx.Node] | None:
    """(activation name, its input) when this node applies an activation that a prologue can, else None."""
    if "bnr_shared" in node.meta:
        return None
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node) or "bnr_shared" in source.meta:
        return None
    name: str | None = None
    if node.op == "call_module":
        module = modules.get(str(node.target))
        if module is None or boundary_reason(module) is not None:
            return None
        if type(module) is nn.LeakyReLU:
            name = leaky_relu_name(module.negative_slope)
        elif type(module) is nn.GELU:
            name = "gelu" if module.approximate == "none" else "gelu_tanh"
        else:
            name = _PLAIN_ACTIVATIONS.get(type(module))
    elif node.op == "call_method":
        name = _PLAIN_ACTIVATIONS.get(node.target)
    elif node.target is F.leaky_relu:
        slope = arguments_of(node, ("input", "negative_slope", "inplace"), {"negative_slope": 0.01})["negative_slope"]
        name = leaky_relu_name(slope) if isinstance(slope, int | float) else None
    elif node.target is F.gelu:
        approximate = node.kwargs.get("approximate", "none")
        name = "gelu" if approximate == "none" else "gelu_tanh"
    elif node.op == "call_function":
        name = _PLAIN_ACTIVATIONS.get(node.target)
    return None if name is None else (name, source)


def add_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that this node adds elementwise with weight one, else None."""
    is_add = (node.op == "call_function" and node.target in (operator.add, torch.add)) or (
        node.op == "call_method" and node.target == "add"
    )
    if not is_add or len(node.args) != 2 or node.kwargs or "bnr_shared" in node.meta:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b or "bnr_shared" in {*a.meta, *b.meta}:
        return None
    return a, b


def concat_of(node: fx.Node) -> list[fx.Node] | None:
    """The segments of a concatenation along channels, else None."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return None
    values = arguments_of(node, ("tensors", "dim"), {"dim": 0})
    segments = values["tensors"]
    if values["dim"] != 1 or not isinstance(segments, list | tuple) or "bnr_shared" in node.meta:
        return None
    return list(segments) if segments and all(isinstance(s, fx.Node) for s in segments) else None


def max_pool_of(node: fx.Node, modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """Window parameters of a 2-D max pool that the fused pool can compute, with its ``input``, else None."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        if type(module) is not nn.MaxPool2d or boundary_reason(module) is not None:
            return None
        values = {k: getattr(module, k) for k in ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")}
        values["input"] = node.args[0] if node.args else None
    elif node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d):
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        values = arguments_of(node, names, defaults)
    else:
        return None
    kernel, stride, padding = _window(values)
    dilation = per_dimension(values["dilation"], 2)
    if kernel is None or stride is None or padding is None or dilation != (1, 1) or values["return_indices"]:
        return None
    if kernel[0] * kernel[1] > 255 or not isinstance(values["input"], fx.Node) or "bnr_shared" in node.meta:
        return None
    return {
        "input": values["input"], "kernel": kernel, "stride": stride, "padding": padding,
        "ceil_mode": bool(values["ceil_mode"]),
    }  # fmt: skip


def avg_pool_of(node: fx.Node, modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """Window parameters of a 2-D average pool all of whose windows have the same divisor, with its ``input``, else None."""
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    if node.op == "call_module":
        module = modules.get(str(node.target))
        if type(module) is not nn.AvgPool2d or boundary_reason(module) is not None:
            return None
        values = {k: getattr(module, k) for k in names[1:]} | {"input": node.args[0] if node.args else None}
    elif node.op == "call_function" and node.target is F.avg_pool2d:
        defaults = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
        values = arguments_of(node, names, defaults)
    else:
        return None
    kernel, stride, padding = _window(values)
    if kernel is None or stride is None or padding is None or not isinstance(values["input"], fx.Node):
        return None
    counts_all = values["count_include_pad"] is True or padding == (0, 0)
    sound = all(2 * p <= k for p, k in zip(padding, kernel, strict=True))  # PyTorch refuses the rest, in its own words
    plain = values["ceil_mode"] is False and values["divisor_override"] is None and "bnr_shared" not in node.meta
    if not (counts_all and sound and plain):
        return None
    return {"input": values["input"], "kernel": kernel, "stride": stride, "padding": padding}


def _window(values: dict[str, Any]) -> tuple[tuple[int, ...] | None, ...]:
    """Kernel, stride and padding of a 2-D pool from its arguments; the stride is the kernel's size where none is given."""
    kernel = per_dimension(values["kernel_size"], 2)
    stride = kernel if values["stride"] in (None, [], ()) else per_dimension(values["stride"], 2)
    return kernel, stride, per_dimension(values["padding"], 2)


@dataclass(frozen=True)
class GlobalAverage:
    """An average over all spatial positions of ``input`` [N, C, H, W]; its result is [N, C, 1, 1] or, without ``keepdim``, [N, C].

    ``only_4d``: it is one for 4-D tensors alone; whoever matches it must know that the input is.
    """

    input: fx.Node
    keepdim: bool = True
    only_4d: bool = False


def global_average_of(node: fx.Node, modules: dict[str, nn.Module]) -> GlobalAverage | None:
    """``AdaptiveAvgPool2d(1)`` in its two spellings, or ``mean`` over dimensions 2 and 3."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        if type(module) is not nn.AdaptiveAvgPool2d or boundary_reason(module) is not None:
            return None
        found = {"output_size": module.output_size, "input": node.args[0] if node.args else None}
    elif node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        found = arguments_of(node, ("input", "output_size"), {"output_size": None})
    else:
        return _mean_of(node)
    whole = found["output_size"] in (1, (1, 1), [1, 1])
    return GlobalAverage(found["input"]) if whole and isinstance(found["input"], fx.Node) else None


#: Dimensions 2 and 3 of a 4-D tensor, in every way to write them.
_LAST_TWO_OF_FOUR = [pair for a in (2, -2) for b in (3, -1) for pair in ((a, b), (b, a))]


def _mean_of(node: fx.Node) -> GlobalAverage | None:
    is_mean = node.target is torch.mean if node.op == "call_function" else node.op == "call_method" and node.target == "mean"
    if not is_mean:
        return None
    values = arguments_of(node, ("input", "dim", "keepdim"), {"input": None, "dim": None, "keepdim": False})
    if "axis" in values:
        values["dim"] = values.pop("axis")
    if set(values) != {"input", "dim", "keepdim"}:
        return None  # a dtype of its own, or memory of the caller's to write to
    source, dims, keepdim = values["input"], values["dim"], values["keepdim"]
    if not isinstance(dims, list | tuple) or tuple(dims) not in _LAST_TWO_OF_FOUR:
        return None
    return GlobalAverage(source, keepdim, only_4d=True) if isinstance(source, fx.Node) and isinstance(keepdim, bool) else None
