"""A few words for what a node does."""

from __future__ import annotations

import operator

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.layers import ConvLayer, module_path, modules_of
from bnrestructure.report.graph_edges import appends, source_of
from bnrestructure.report.names import relative

__all__ = ["by", "conv_words", "fused_words", "notes_of", "part_of_reason", "plain_words", "strided"]


def fused_words(node: fx.Node, gm: fx.GraphModule) -> tuple[str, str]:
    """(kind, words) of a fused node."""
    kwargs = node.kwargs
    if node.target is ops.conv:
        return "conv", conv_words(node.meta.get("bnr_conv"), gm)
    if node.target is ops.residual:
        return "add", "add" if kwargs["act"] == "identity" else f"add + {kwargs['act']}"
    if node.target is ops.max_pool:
        return "pool", f"max pool {by(kwargs['kernel'])}{strided(kwargs['stride'])}"
    if node.target is ops.avg_pool:
        return "pool", f"average pool {by(kwargs['kernel'])}{strided(kwargs['stride'])}"
    if node.target is ops.squeeze:
        return "pool", "squeeze" if kwargs["excite"] else "global average pool"
    if node.target is ops.statistics:
        return "sweep", "statistics"
    if node.target is ops.normalise:
        return "sweep", "normalise"
    if node.target is ops.concat_buffer:
        return "buffer", _buffer_words(node)
    return "other", "gradient in memory of its own"


def conv_words(layer: ConvLayer | None, gm: fx.GraphModule) -> str:
    """``conv 3x3 64->128 /2``."""
    if layer is None:
        return "conv"
    shape = _weight_shape(layer, gm)
    kernel = "" if shape is None else f" {by(shape[2:])}"
    if layer.depthwise:
        channels, kind = f" {layer.out_channels}", "depthwise"
    else:
        kind = "conv"
        channels = "" if shape is None else f" {shape[1] * layer.groups}->{shape[0]}"
    extras = strided(layer.stride)
    if layer.groups > 1 and not layer.depthwise:
        extras += f" groups {layer.groups}"
    if any(d != 1 for d in layer.dilation):
        extras += f" dilation {layer.dilation[0]}"
    return f"{kind}{kernel}{channels}{extras}"


def _weight_shape(layer: ConvLayer, gm: fx.GraphModule) -> tuple[int, ...] | None:
    if isinstance(layer.weight, str):
        return tuple(operator.attrgetter(layer.weight)(gm).shape) if "." in layer.weight else None
    example = None if layer.weight is None else layer.weight.meta.get("example_value")
    if example is None and isinstance(layer.weight, fx.Node) and layer.weight.op == "get_attr":
        path, _, name = str(layer.weight.target).rpartition(".")
        example = getattr(modules_of(gm).get(path, gm), name, None)
    return None if example is None else tuple(example.shape)


def plain_words(node: fx.Node, gm: fx.GraphModule) -> str:
    """The name of the layer, method or function that a node calls."""
    if node.op == "call_module":
        module = modules_of(gm).get(str(node.target))
        return type(module).__name__
    if node.op == "call_method":
        return str(node.target)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return f"{node.args[0].name}[{node.args[1]}]"
    return str(getattr(node.target, "__name__", node.target)).removeprefix("_")


def _buffer_words(node: fx.Node) -> str:
    if isinstance(node.kwargs.get("into"), fx.Node):
        return f"copied into a buffer, channels {node.kwargs['offset']}.."
    extra = node.kwargs.get("extra")
    return f"buffer, {extra} channels to come" if extra else f"buffer of {node.kwargs['channels']} channels"


def notes_of(node: fx.Node, group: str) -> list[str]:
    """Threads, shared buffers and gains."""
    kwargs, notes = node.kwargs, []
    if kwargs.get("thread"):
        notes.append("passes its input on" if kwargs.get("r") is None else "passes the sum on")
    if node.target is ops.conv and isinstance(kwargs["into"], fx.Node):
        place = "appended" if appends(node) else f"channels {kwargs['offset']}.."
        notes.append(f"written into {_buffer_name(kwargs['into'], group)}, {place}")
    elif node.target is ops.conv and kwargs["channels"] is not None:
        notes.append(f"starts a buffer of {kwargs['channels']} channels, at {kwargs['offset']}")
    if kwargs.get("gain") is True:
        notes.append("applies s in backward")
    return notes


def _buffer_name(tensor: fx.Node, group: str) -> str:
    """``the buffer of branch1.conv``: named after the node that allocated the memory in which this tensor lies."""
    node = source_of(tensor)
    while isinstance(into := node.kwargs.get("into"), fx.Node):
        node = source_of(into)
    return "the buffer" if node.target is ops.concat_buffer else f"the buffer of {relative(module_path(node), group)}"


def part_of_reason(reason: str | None, node: fx.Node) -> str | None:
    """A plan gives a reason for each half of a site; a node that stands alone is one of the halves."""
    word = "statistics" if node.target is ops.statistics else "normalised"
    parts = [part for part in (reason or "").split("; ") if word in part]
    return "; ".join(parts) or reason


def by(sizes: object) -> str:
    """``3x3``."""
    return "x".join(str(s) for s in sizes)  # type: ignore[attr-defined]


def strided(stride: object) -> str:
    """`` /2``, or nothing for stride 1."""
    sizes = list(stride)  # type: ignore[call-overload]
    if all(s == 1 for s in sizes):
        return ""
    return f" /{sizes[0] if len(set(sizes)) == 1 else by(sizes)}"
