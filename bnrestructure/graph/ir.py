"""The fused nodes of a graph, one typed view for each: the only file that spells what the ops call their arguments.

    conv = Conv.of(node)                     a view, or None
    conv.x, conv.mean, conv.statistics       its operands, as fx nodes, and its options, as plain values
    conv.update(statistics=True)             writes to the node
    conv.out("y")                            the node of an output, by the names of the op's NamedTuple
    Conv.making(value, "y")                  the view of the node that ``value`` is the y of, or None
    Conv.create(before=node, x=..., ...)     a new node

What each op means, and the shapes of its operands, is told where it is defined (``bnrestructure.ops``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from bnrestructure import ops
from bnrestructure.core.edges import ConvGeometry, PoolGeometry, Transform
from bnrestructure.graph.layers import Number
from bnrestructure.graph.view import Fused, Group, item_of
from bnrestructure.kernels.unmerged import Wanted

__all__ = [
    "FUSED",
    "OTHERS",
    "AvgPool",
    "BatchNorm",
    "ConcatBuffer",
    "Conv",
    "Finalize",
    "Link",
    "MaxPool",
    "Normalise",
    "OwnGradient",
    "Reader",
    "Residual",
    "Squeeze",
    "Statistics",
    "Synchronise",
    "Unchanged",
    "Writer",
    "buffer_writer",
    "end_of",
    "fused_of",
    "has_fused",
    "is_fused",
    "maker_of",
    "output_of",
]

_OF_READER = {"transform": Group(Transform)}
_OF_NORMALISE = _OF_READER | {"slot": Group(ops.Slot)}
_OF_CONV = _OF_NORMALISE | {"geometry": Group(ConvGeometry), "shortcut": Group(ops.Shortcut)}
_OF_POOL = _OF_READER | {"geometry": Group(PoolGeometry)}
_OF_FINALIZE = {"running": Group(ops.Running), "more": Group(ops.More)}
_OF_RESIDUAL = _OF_READER | {"r_transform": Group(Transform, "r_")}


@dataclass(frozen=True, eq=False, kw_only=True)
class OfX(Fused):
    """A node that reads one tensor, x."""

    x: fx.Node

    @property
    def input(self) -> fx.Node:
        """The tensor that the node reads."""
        return self.x


@dataclass(frozen=True, eq=False, kw_only=True)
class Reader(OfX):
    """A node that applies what is at its incoming edge: ``act((x - mean) * scale + beta)``, the three vectors all there or none."""

    mean: fx.Node | None = None
    scale: fx.Node | None = None
    beta: fx.Node | None = None
    act: str = "identity"
    backend: str = "auto"

    @property
    def edge(self) -> dict[str, Any]:
        """The five fields of the edge, as another reader takes them."""
        return {"x": self.x, "mean": self.mean, "scale": self.scale, "beta": self.beta, "act": self.act}


@dataclass(frozen=True, eq=False, kw_only=True)
class Link(OfX):
    """A node that can be a link of a chain: it hands on x, as its output ``passed``, to the next reader, and adds to its gradient."""

    chain: bool = False

    @property
    def passes_x(self) -> bool:
        """Whether the output ``passed`` is x."""
        return self.chain


@dataclass(frozen=True, eq=False, kw_only=True)
class Writer(OfX):
    """A node that can write its result into the buffer of a concat; the buffer is then its output of the name ``buffer_output``."""

    into: fx.Node | None = None
    offset: int | None = 0
    channels: int | None = None
    visible: int | None = None

    buffer_output: ClassVar[str]

    @property
    def in_buffer(self) -> bool:
        """Whether the result is a slice of a concat's buffer."""
        return self.into is not None or self.channels is not None

    @property
    def appends(self) -> bool:
        """Whether the result comes right behind what is in the buffer, and is returned together with it."""
        return self.into is not None and self.offset is None


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Reader, Link, Writer, op=ops.conv, outputs=ops.ConvOutputs, groups=_OF_CONV):
    """A convolution. With a shortcut ``r`` its prologue is a residual, and it passes on the sum."""

    weight: fx.Node
    bias: fx.Node | None = None
    gate: fx.Node | None = None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    statistics: Wanted = False
    gain: bool = False
    r: fx.Node | None = None
    r_mean: fx.Node | None = None
    r_scale: fx.Node | None = None
    r_beta: fx.Node | None = None
    x_gain: fx.Node | None = None
    r_gain: fx.Node | None = None

    buffer_output: ClassVar[str] = "y"

    @property
    def forms_residual(self) -> bool:
        """Whether the prologue is a residual."""
        return self.r is not None

    @property
    def passes_x(self) -> bool:
        """Whether the output ``passed`` is x, and not the sum of a residual."""
        return self.chain and not self.forms_residual

    @property
    def is_bare(self) -> bool:
        """Whether x is read as it is."""
        return self.mean is None and self.act == "identity" and self.gate is None and not self.forms_residual


@dataclass(frozen=True, eq=False, kw_only=True)
class Statistics(Link, op=ops.statistics, outputs=ops.StatisticsOutputs):
    """Batch statistics in a sweep of their own."""

    unmerged: bool = False
    backend: str = "auto"


@dataclass(frozen=True, eq=False, kw_only=True)
class Synchronise(Fused, op=ops.synchronise, outputs=ops.SynchroniseOutputs):
    """Statistics merged across ranks."""

    mean: fx.Node
    var: fx.Node
    size: fx.Node
    process_group: fx.Node | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class OfLayer(Fused):
    """A node with the parameters, buffers and numbers of a batch norm layer."""

    weight: fx.Node | None = None
    bias: fx.Node | None = None
    running_mean: fx.Node | None = None
    running_var: fx.Node | None = None
    num_batches_tracked: fx.Node | None = None
    momentum: Number | None = None
    eps: Number
    dimensions: tuple[int, ...] = ()

    @property
    def layer(self) -> dict[str, Any]:
        """These fields, as another node takes them."""
        return {name: getattr(self, name) for name in OfLayer.__annotations__}


@dataclass(frozen=True, eq=False, kw_only=True)
class Finalize(OfLayer, op=ops.finalize, outputs=ops.FinalizeOutputs, groups=_OF_FINALIZE):
    """The per-channel step between the halves of a batch norm. It can be a link of a chain, too, of the readers of its statistics."""

    mean: fx.Node
    var: fx.Node
    size: fx.Node
    behind_mean: fx.Node | None = None
    behind_var: fx.Node | None = None
    unmerged: fx.Node | None = None
    chain: bool = False
    backend: str = "auto"

    @property
    def last_part(self) -> tuple[fx.Node, fx.Node]:
        """The mean and the variance into which ``unmerged`` is merged: those behind the others, where there are such."""
        if self.behind_mean is None or self.behind_var is None:
            return self.mean, self.var
        return self.behind_mean, self.behind_var


@dataclass(frozen=True, eq=False, kw_only=True)
class Normalise(Reader, Link, Writer, op=ops.normalise, outputs=ops.NormaliseOutputs, groups=_OF_NORMALISE):
    """``act((x - mean) * scale + beta) * gate * factor + r`` in a sweep of its own; gate, factor and r may be missing. With a gate, x is
    what a squeeze defers.
    """

    gate: fx.Node | None = None
    factor: fx.Node | None = None
    r: fx.Node | None = None

    buffer_output: ClassVar[str] = "buffer"

    @property
    def is_plain(self) -> bool:
        """Whether the result is a normalised tensor in memory of its own, and nothing more."""
        return self.gate is None and self.factor is None and self.r is None and not self.in_buffer

    @property
    def is_alone(self) -> bool:
        """Whether the sweep does nothing for a neighbour: no sum, no factor of each image, no slice of a concat."""
        return self.r is None and self.factor is None and not self.in_buffer


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Reader, Link, op=ops.max_pool, outputs=ops.PoolOutputs, groups=_OF_POOL):
    """A 2-D max pool."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class AvgPool(Reader, Link, op=ops.avg_pool, outputs=ops.PoolOutputs, groups=_OF_POOL):
    """A 2-D average pool all of whose windows have one divisor."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Squeeze(Reader, op=ops.squeeze, outputs=ops.SqueezeOutputs, groups=_OF_READER):
    """A global average; with ``excite`` it also hands on x, standing for what is to be gated."""

    excite: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Residual(Fused, op=ops.residual, outputs=ops.ResidualOutputs, groups=_OF_RESIDUAL):
    """``act(normalise(y) * gate + shortcut)``, the shortcut being r, or r normalised; ``act(y + r)`` without vectors. With a gate, y is
    what a squeeze defers.
    """

    y: fx.Node
    mean: fx.Node | None = None
    scale: fx.Node | None = None
    beta: fx.Node | None = None
    gate: fx.Node | None = None
    r: fx.Node
    r_mean: fx.Node | None = None
    r_scale: fx.Node | None = None
    r_beta: fx.Node | None = None
    act: str = "identity"
    gain: fx.Node | None = None
    r_gain: fx.Node | None = None
    statistics: Wanted = False
    backend: str = "auto"

    @property
    def input(self) -> fx.Node:
        """The tensor that the node reads."""
        return self.y

    @property
    def forms_residual(self) -> bool:
        """It is one."""
        return True


@dataclass(frozen=True, eq=False, kw_only=True)
class ConcatBuffer(OfX, op=ops.concat_buffer):
    """A segment copied into the buffer of a concat: into one that is there, or a new one. The node is the buffer."""

    into: fx.Node | None = None
    offset: int = 0
    channels: int = 0
    extra: int = 0
    visible: int | None = None
    own: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnGradient(OfX, op=ops.own_gradient):
    """x, whose gradient arrives in memory of its own. The node is x."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm(OfX, OfLayer, op=ops.batch_norm):
    """A batch norm that was put together again, with its activation. The node is its result."""

    act: str = "identity"


@dataclass(frozen=True, eq=False, kw_only=True)
class Unchanged(OfX, op=ops.unchanged, outputs=ops.UnchangedOutputs):
    """The vectors of an edge that leaves x as it is."""


#: The nodes that carry halves of batch norms, and what goes with them.
FUSED: tuple[type[Fused], ...] = (
    Conv, Statistics, Finalize, Normalise, MaxPool, AvgPool, Squeeze, Residual, ConcatBuffer, OwnGradient,
)  # fmt: skip
OTHERS: tuple[type[Fused], ...] = (Synchronise, BatchNorm, Unchanged)
_VIEWS: dict[Any, type[Fused]] = {view.op: view for view in (*FUSED, *OTHERS)}
_FUSED_OPS = {view.op for view in FUSED}


def fused_of(node: object) -> Fused | None:
    """The view of a node that calls any of the ops, or None."""
    view = _VIEWS.get(node.target) if isinstance(node, fx.Node) else None
    return None if view is None else view.of(node)


def output_of(value: fx.Node) -> tuple[fx.Node, str] | None:
    """(the node of which ``value`` is an output, the output's name); None where it is no output of one of several."""
    item = item_of(value)
    view = None if item is None else _VIEWS.get(item[0].target)
    return None if item is None or view is None else (item[0], view.outputs[item[1]])


def maker_of(value: object) -> tuple[Fused | None, str | None]:
    """(the view of the node that makes ``value``, which of its outputs that is). The first is None where no op makes it, the second where
    the node has a single result.
    """
    output = output_of(value) if isinstance(value, fx.Node) else None
    return (fused_of(value), None) if output is None else (fused_of(output[0]), output[1])


def buffer_writer(value: object) -> Writer | ConcatBuffer | None:
    """The view of the node whose write into a concat's buffer left this state of the buffer; None of any other tensor."""
    maker, output = maker_of(value)
    if isinstance(maker, Writer):
        return maker if maker.in_buffer and output == maker.buffer_output else None
    return maker if isinstance(maker, ConcatBuffer) else None


def end_of(tensor: fx.Node) -> fx.Node:
    """The node behind which a new reader of this tensor may stand: outputs of one node stay together."""
    maker, output = maker_of(tensor)
    return tensor if maker is None or output is None else maker.last


def is_fused(node: object) -> bool:
    """Whether this is a fused node: not so a batch norm left whole, nor vectors on their own."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _FUSED_OPS


def has_fused(graph: fx.Graph) -> bool:
    """Whether any of the graph's nodes is fused."""
    return any(graph.find_nodes(op="call_function", target=view.op, sort=False) for view in FUSED)
