"""Which operation without parameters a node of a captured graph is: a sum, a concat or a pool, however spelt."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnrestructure.graph.boundaries import boundary_reason
from bnrestructure.graph.layers import arguments_of, input_of, module_of, per_dimension
from bnrestructure.graph.provenance import known_tensor, provenance

__all__ = [
    "AveragePooling",
    "GlobalAverage",
    "MaxPooling",
    "Pooling",
    "add_of",
    "concat_of",
    "handed_through",
    "pooling_of",
    "product_of",
    "zero_added_to",
]


def add_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that this node adds elementwise with weight one, else None."""
    is_add = (node.op == "call_function" and node.target in (operator.add, torch.add)) or (
        node.op == "call_method" and node.target == "add"
    )
    if not is_add or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return None
    return (a, b) if all(provenance(n).changed_by is None for n in (node, a, b)) else None


def zero_added_to(node: fx.Node) -> fx.Node | None:
    """The tensor to which this node adds the number 0, as Python's ``sum`` begins: the result has the same values. Else None."""
    if node.op != "call_function" or node.target not in (operator.add, torch.add) or len(node.args) != 2 or node.kwargs:
        return None
    numbers = [a for a in node.args if isinstance(a, int | float)]
    if numbers != [0] or len(node.all_input_nodes) != 1:
        return None
    (x,) = node.all_input_nodes
    known = known_tensor(node), known_tensor(x)
    same = all(t is not None and t.dtype.is_floating_point for t in known) and known[0].dtype == known[1].dtype
    return x if same and all(provenance(n).changed_by is None for n in (node, x)) else None


#: Layers that drop values at random, and the functions, with the names of their arguments.
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.dropout, F.dropout2d, F.dropout3d, F.alpha_dropout), ("input", "p", "training", "inplace")),
    torch.dropout: ("input", "p", "train"),
}


def handed_through(node: fx.Node) -> fx.Node | None:
    """The tensor that this node returns as it is, the very same one: ``nn.Identity``, a dropout that drops nothing. Else None."""
    module = module_of(node)
    if module is not None:
        drops = type(module) in _DROPOUTS and module.training and module.p != 0
        known = type(module) is nn.Identity or type(module) in _DROPOUTS
        if not known or drops or boundary_reason(module) is not None:
            return None
    elif node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS:
        values = arguments_of(node, _DROPOUT_FUNCTIONS[node.target], {"p": 0.5, "training": node.target is not F.alpha_dropout})
        p, training = values["p"], values.get("train", values["training"])
        if training is not False and not (isinstance(p, int | float) and p == 0):
            return None
    else:
        return None
    return input_of(node) if len(node.all_input_nodes) == 1 else None


def product_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that this node multiplies elementwise, else None."""
    is_product = node.target in (operator.mul, torch.mul) or (node.op == "call_method" and node.target == "mul")
    if not is_product or len(node.args) != 2 or node.kwargs or provenance(node).changed_by is not None:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b else None


def concat_of(node: fx.Node) -> list[fx.Node] | None:
    """The segments of a concatenation along channels, else None. Segments of several kinds are promoted, or skipped: no concat of ours."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return None
    values = arguments_of(node, ("tensors", "dim"), {"dim": 0})
    segments = values["tensors"]
    known = provenance(node)
    if values["dim"] != 1 or not isinstance(segments, list | tuple) or known.changed_by is not None or known.unlike:
        return None
    return list(segments) if segments and all(isinstance(s, fx.Node) for s in segments) else None


@dataclass(frozen=True)
class Pooling:
    """A pool of ``input``."""

    node: fx.Node
    input: fx.Node


@dataclass(frozen=True)
class AveragePooling(Pooling):
    """A 2-D average pool all of whose windows have the same divisor; (height, width) of its parameters."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True)
class MaxPooling(Pooling):
    """A 2-D max pool of at most 255 positions without dilation; (height, width) of its parameters."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool


@dataclass(frozen=True)
class GlobalAverage(Pooling):
    """An average over all spatial positions of ``input`` [N, C, H, W]; its result is [N, C, 1, 1] or, without ``keepdim``, [N, C].

    ``only_4d``: it is one for 4-D tensors alone; whoever matches it must know that the input is.
    """

    keepdim: bool = True
    only_4d: bool = False


#: The pools that are modules: which arguments of the function the module has as attributes.
_MODULES: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.MaxPool2d: (F.max_pool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    nn.AvgPool2d: (F.avg_pool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")),
    nn.AdaptiveAvgPool2d: (F.adaptive_avg_pool2d, ("output_size",)),
}
#: The functions: the names of their arguments behind the input, with the defaults of those that have one.
_FUNCTIONS: dict[Any, tuple[tuple[str, ...], dict[str, Any]]] = {
    F.max_pool2d: (_MODULES[nn.MaxPool2d][1],
        {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}),
    F.avg_pool2d: (_MODULES[nn.AvgPool2d][1],
        {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}),
    F.adaptive_avg_pool2d: (("output_size",), {"output_size": None}),
}  # fmt: skip
_FUNCTIONS[torch.max_pool2d] = _FUNCTIONS[F.max_pool2d]


def pooling_of(node: fx.Node) -> Pooling | None:
    """The pool that this node is, if a fused one can compute the same."""
    if node.op == "call_module":
        module = module_of(node)
        if type(module) not in _MODULES or module is None or boundary_reason(module) is not None:
            return None
        function, names = _MODULES[type(module)]
        values = {name: getattr(module, name) for name in names} | {"input": input_of(node)}
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        function = node.target
        names, defaults = _FUNCTIONS[node.target]
        values = arguments_of(node, ("input", *names), defaults)
    else:
        return _mean_of(node)
    source = values["input"]
    if not isinstance(source, fx.Node):
        return None
    if function is F.adaptive_avg_pool2d:
        return GlobalAverage(node, source) if values["output_size"] in (1, (1, 1), [1, 1]) else None
    kernel = per_dimension(values["kernel_size"], 2)
    stride = kernel if values["stride"] in (None, [], ()) else per_dimension(values["stride"], 2)
    padding = per_dimension(values["padding"], 2)
    if kernel is None or stride is None or padding is None or provenance(node).changed_by is not None:
        return None
    if function is F.avg_pool2d:
        return AveragePooling(node, source, kernel, stride, padding) if _has_one_divisor(values, kernel, padding) else None
    plain = per_dimension(values["dilation"], 2) == (1, 1) and not values["return_indices"] and kernel[0] * kernel[1] <= 255
    return MaxPooling(node, source, kernel, stride, padding, bool(values["ceil_mode"])) if plain else None


def _has_one_divisor(values: dict[str, Any], kernel: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Whether an average pool divides by the size of its kernel everywhere."""
    counts_all = values["count_include_pad"] is True or padding == (0, 0)
    sound = all(2 * p <= k for p, k in zip(padding, kernel, strict=True))  # PyTorch refuses the rest, in its own words
    return counts_all and sound and values["ceil_mode"] is False and values["divisor_override"] is None


#: Dimensions 2 and 3 of a 4-D tensor, in every way to write them.
_LAST_TWO_OF_FOUR = [pair for a in (2, -2) for b in (3, -1) for pair in ((a, b), (b, a))]


def _mean_of(node: fx.Node) -> GlobalAverage | None:
    """``mean`` over dimensions 2 and 3."""
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
    known = isinstance(source, fx.Node) and isinstance(keepdim, bool)
    return GlobalAverage(node, source, keepdim, only_4d=True) if known else None
