"""A few words for what a node does."""

from __future__ import annotations

import operator

from torch import fx, nn

from bnrestructure.graph.ir import AvgPool, ConcatBuffer, Conv, Link, MaxPool, Normalise, Residual, Squeeze, Statistics, Writer, fused_of
from bnrestructure.graph.layers import ConvLayer, is_depthwise, module_of, shape_of
from bnrestructure.graph.provenance import module_path
from bnrestructure.graph.view import Fused
from bnrestructure.report.graph_edges import source_of
from bnrestructure.report.names import relative

__all__ = ["by", "conv_words", "fused_words", "notes_of", "part_of_reason", "plain_words", "strided"]


def fused_words(view: Fused) -> tuple[str, str]:
    """(kind, words) of a fused node."""
    match view:
        case Conv():
            return "conv", conv_words(view)
        case Residual():
            return "add", "add" if view.act == "identity" else f"add + {view.act}"
        case MaxPool():
            return "pool", f"max pool {by(view.kernel)}{strided(view.stride)}"
        case AvgPool():
            return "pool", f"average pool {by(view.kernel)}{strided(view.stride)}"
        case Squeeze():
            return "pool", "squeeze" if view.excite else "global average pool"
        case Statistics():
            return "sweep", "statistics"
        case Normalise():
            return "sweep", "normalise" if view.r is None else "normalise and add"
        case ConcatBuffer():
            return "buffer", _buffer_words(view)
    return "other", "gradient in memory of its own"


def conv_words(conv: Conv | ConvLayer) -> str:
    """``conv 3x3 64->128 /2``."""
    shape = _weight_shape(conv)
    kernel = "" if shape is None else f" {by(shape[2:])}"
    depthwise = is_depthwise(shape, conv.groups)
    channels = "" if shape is None else f" {shape[0]}" if depthwise else f" {shape[1] * conv.groups}->{shape[0]}"
    extras = strided(conv.stride)
    if conv.groups > 1 and not depthwise:
        extras += f" groups {conv.groups}"
    if any(d != 1 for d in conv.dilation):
        extras += f" dilation {conv.dilation[0]}"
    return f"{'depthwise' if depthwise else 'conv'}{kernel}{channels}{extras}"


def _weight_shape(conv: Conv | ConvLayer) -> tuple[int, ...] | None:
    if isinstance(conv.weight, fx.Node):
        return shape_of(conv.weight)
    module = module_of(conv.node)
    return tuple(module.weight.shape) if isinstance(module, nn.modules.conv._ConvNd) else None


def plain_words(node: fx.Node) -> str:
    """The name of the layer, method or function that a node calls."""
    if node.op == "call_module":
        return type(module_of(node)).__name__
    if node.op == "call_method":
        return str(node.target)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return f"{node.args[0].name}[{node.args[1]}]"
    return str(getattr(node.target, "__name__", node.target)).removeprefix("_")


def _buffer_words(buffer: ConcatBuffer) -> str:
    if buffer.into is not None:
        return f"copied into a buffer, channels {buffer.offset}.."
    return f"buffer, {buffer.extra} channels to come" if buffer.extra else f"buffer of {buffer.channels} channels"


def notes_of(view: Fused, group: str) -> list[str]:
    """Chains, shared buffers and gains."""
    notes = []
    if isinstance(view, Link) and view.chain:
        notes.append("passes its input on" if view.passes_x else "passes the sum on")
    if isinstance(view, Writer) and view.into is not None:
        place = "appended" if view.appends else f"channels {view.offset}.."
        notes.append(f"written into {_buffer_name(view.into, group)}, {place}")
    elif isinstance(view, Writer) and view.channels is not None:
        notes.append(f"starts a buffer of {view.channels} channels, at {view.offset}")
    if isinstance(view, Conv) and view.gain:
        notes.append("applies s in backward")
    return notes


def _buffer_name(tensor: fx.Node, group: str) -> str:
    """``the buffer of branch1.conv``: named after the node that allocated the memory in which this tensor lies."""
    node = source_of(tensor)
    view = fused_of(node)
    while isinstance(view, Writer | ConcatBuffer) and view.into is not None:
        node = source_of(view.into)
        view = fused_of(node)
    return "the buffer" if isinstance(view, ConcatBuffer) else f"the buffer of {relative(module_path(node), group)}"


def part_of_reason(reason: str | None, node: fx.Node) -> str | None:
    """A plan gives a reason for each half of a site; a node that stands alone is one of the halves."""
    word = "statistics" if isinstance(fused_of(node), Statistics) else "normalised"
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
