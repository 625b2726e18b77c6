"""A captured or rewritten graph as people think of it: one entry for each layer, and on it what rides along."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn

from bnrestructure import ops
from bnrestructure.graph.fused import OUTPUTS, is_fused, produced_by
from bnrestructure.graph.layers import (
    ConvLayer,
    activation_of,
    add_of,
    batch_norm_of,
    concat_of,
    conv_of,
    max_pool_of,
    module_path,
    modules_of,
)
from bnrestructure.ops.synchronise import synchronise
from bnrestructure.plan import Site
from bnrestructure.report.graph_backward import backward_of
from bnrestructure.report.names import relative, shortened

__all__ = ["Entry", "RegionView", "view_region"]


@dataclass
class Entry:
    """One line of a shown graph.

    id, kind         the node's name in the fx graph; what it is: conv, bn, act, add, concat, pool, sweep, buffer, input, output, other
    module           path of the original module, or of the one whose forward() calls it; ``group`` is the module that it is shown in
    name, what       name inside the group; a few words: ``conv 3x3 64->64 /2``
    inputs           ids of the entries that it reads; ``shortcut`` is the one among them that a residual join adds
    prologue         what is applied to its input as it is read: ``bn1 norm + relu``, and the sites in question
    epilogue         what is computed of its result on the way out: ``bn2 statistics``
    notes            threads, shared buffers, gains
    status, reason   of the site that this entry leaves unfused, None elsewhere
    backward         what its backward does: (prologue, work, epilogue)
    """

    id: str
    kind: str
    module: str
    group: str
    name: str
    what: str
    inputs: list[str] = field(default_factory=list)
    shortcut: str | None = None
    prologue: str | None = None
    prologue_sites: list[str] = field(default_factory=list)
    epilogue: str | None = None
    epilogue_sites: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: str | None = None
    reason: str | None = None
    backward: dict[str, str | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class RegionView:
    """One region's graph: entries in the order of execution."""

    path: str
    entries: list[Entry]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"path": self.path, "nodes": [entry.to_json() for entry in self.entries]}


def view_region(path: str, gm: fx.GraphModule, captured: fx.GraphModule, sites: dict[str, Site]) -> RegionView:
    """The view of one region's graph, of which ``captured`` is the state before any pass.

    ``sites`` by full name give the reasons of what was left unfused.
    """
    own = {node.name for node in captured.graph.nodes}
    builder = _Builder(path, gm, sites)
    entries: list[Entry] = []
    for node in gm.graph.nodes:
        entry = builder.entry(node)
        if entry is None:
            continue
        if not entry.module and entry.id not in own and entries:
            entry.group = entries[-1].group  # made by a pass: it belongs where it stands
        entries.append(entry)
    return RegionView(path, entries)


class _Builder:
    def __init__(self, path: str, gm: fx.GraphModule, sites: dict[str, Site]) -> None:
        self.prefix = f"{path}." if path else ""
        self.gm = gm
        self.modules: dict[str, nn.Module] = modules_of(gm)
        self.sites = sites
        self.sizes: set[fx.Node] = set()  # nodes that compute shapes, not tensors

    def entry(self, node: fx.Node) -> Entry | None:
        """The entry for this node, or None for what is tucked into others: attributes, per-channel vectors, outputs of fused nodes."""
        if _is_tucked(node) or self._is_size(node):
            return None
        entry = self._described(node)
        sources = [source for n in _data_inputs(node) for source in _sources(n)]
        shown = [source for source in sources if not _is_tucked(source) and source not in self.sizes]
        entry.inputs = list(dict.fromkeys(source.name for source in shown))
        entry.backward = backward_of(node, entry.prologue_sites, entry.epilogue_sites, entry.group)
        return entry

    def _is_size(self, node: fx.Node) -> bool:
        """Whether the node is arithmetic on shapes: of no interest to a reader of the graph."""
        made = node.op == "call_method" and node.target in ("size", "dim", "numel")
        made = made or (node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"))
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        derived = node.op == "call_function" and bool(sources) and all(n in self.sizes for n in sources)
        if made or derived:
            self.sizes.add(node)
        return made or derived

    def _described(self, node: fx.Node) -> Entry:
        if node.op in ("placeholder", "output"):
            kind = "input" if node.op == "placeholder" else "output"
            return Entry(node.name, kind, "", "", node.name, "input" if kind == "input" else "")
        if is_fused(node):
            return self._fused(node)
        layer = conv_of(node, self.modules)
        if isinstance(layer, ConvLayer):
            return self._new(node, "conv", self._conv_words(layer))
        if batch_norm_of(node, self.modules) is not None or node.target is ops.batch_norm:
            return self._batch_norm(node)
        act = activation_of(node, self.modules)
        if act is not None:
            return self._new(node, "act", act[0])
        if add_of(node) is not None:
            return self._new(node, "add", "add")
        segments = concat_of(node)
        if segments is not None:
            return self._new(node, "concat", f"concat of {len(segments)}")
        pool = max_pool_of(node, self.modules)
        if pool is not None:
            return self._new(node, "pool", f"max pool {_by(pool['kernel'])}{_strided(pool['stride'])}")
        return self._new(node, "other", self._plain_words(node))

    def _new(self, node: fx.Node, kind: str, what: str) -> Entry:
        path = module_path(node)
        module = self.modules.get(path)
        inside = module is None or any(True for _ in module.children())  # called by that module's forward(), not the module itself
        if path == node.name and path not in self.modules:
            path = ""
        group, _, name = (path, "", "") if inside else path.rpartition(".")
        if kind == "buffer" or what == "statistics":
            name = ""  # a pass put it there; the module in its stack is the one that made the tensor
        return Entry(node.name, kind, path, group, name or ("buffer" if kind == "buffer" else what.split(" ")[0]), what)

    def _batch_norm(self, node: fx.Node) -> Entry:
        act = str(node.kwargs.get("act", "identity")) if node.target is ops.batch_norm else "identity"
        entry = self._new(node, "bn", "batch norm" if act == "identity" else f"batch norm + {act}")
        site = next(iter(node.meta.get("bnr_kept", [])), node.meta.get("bnr_site", module_path(node)))
        planned = self.sites.get(self.prefix + site)
        if planned is not None and planned.status == "kept":
            entry.status, entry.reason = "kept", planned.reason
        return entry

    def _fused(self, node: fx.Node) -> Entry:
        entry = self._new(node, *self._fused_words(node))
        kwargs = node.kwargs
        entry.prologue_sites = _normalised_sites(node)
        entry.epilogue_sites = list(node.meta.get("bnr_statistics_of", []))
        act = str(kwargs.get("act", "identity"))
        if node.target is ops.residual:
            entry.shortcut = _source(kwargs["r"]).name  # type: ignore[arg-type]
        if entry.prologue_sites:
            entry.prologue = f"{shortened(entry.prologue_sites, entry.group)} norm"
        if act != "identity" and node.target is not ops.residual:
            entry.prologue = act if entry.prologue is None else f"{entry.prologue} + {act}"
        if kwargs.get("gate") is not None:
            entry.prologue = f"{entry.prologue or ''} * gate".strip()
        if entry.epilogue_sites:
            entry.epilogue = f"{shortened(entry.epilogue_sites, entry.group)} statistics"
        entry.notes = _notes(node, entry.group)
        alone = {ops.statistics: entry.epilogue_sites, ops.normalise: entry.prologue_sites}.get(node.target, [])  # type: ignore[call-overload]
        for site in alone:
            planned = self.sites.get(self.prefix + site)
            if planned is not None and planned.status != "fused":
                entry.status, entry.reason = planned.status, _part_of_reason(planned.reason, node)
        return entry

    def _fused_words(self, node: fx.Node) -> tuple[str, str]:
        kwargs = node.kwargs
        if node.target is ops.conv:
            return "conv", self._conv_words(node.meta.get("bnr_conv"))
        if node.target is ops.residual:
            return "add", "add" if kwargs["act"] == "identity" else f"add + {kwargs['act']}"
        if node.target is ops.max_pool:
            return "pool", f"max pool {_by(kwargs['kernel'])}{_strided(kwargs['stride'])}"
        if node.target is ops.squeeze:
            return "pool", "squeeze" if kwargs["excite"] else "global average pool"
        if node.target is ops.statistics:
            return "sweep", "statistics"
        if node.target is ops.normalise:
            return "sweep", "normalise"
        if node.target is ops.concat_buffer:
            return "buffer", _buffer_words(node)
        return "other", "gradient in memory of its own"

    def _conv_words(self, layer: ConvLayer | None) -> str:
        if layer is None:
            return "conv"
        shape = self._weight_shape(layer)
        kernel = "" if shape is None else f" {_by(shape[2:])}"
        if layer.depthwise:
            channels, kind = f" {layer.out_channels}", "depthwise"
        else:
            kind = "conv"
            channels = "" if shape is None else f" {shape[1] * layer.groups}->{shape[0]}"
        extras = _strided(layer.stride)
        if layer.groups > 1 and not layer.depthwise:
            extras += f" groups {layer.groups}"
        if any(d != 1 for d in layer.dilation):
            extras += f" dilation {layer.dilation[0]}"
        return f"{kind}{kernel}{channels}{extras}"

    def _weight_shape(self, layer: ConvLayer) -> tuple[int, ...] | None:
        if isinstance(layer.weight, str):
            return tuple(operator.attrgetter(layer.weight)(self.gm).shape) if "." in layer.weight else None
        example = None if layer.weight is None else layer.weight.meta.get("example_value")
        if example is None and isinstance(layer.weight, fx.Node) and layer.weight.op == "get_attr":
            path, _, name = str(layer.weight.target).rpartition(".")
            example = getattr(self.modules.get(path, self.gm), name, None)
        return None if example is None else tuple(example.shape)

    def _plain_words(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.modules.get(str(node.target))
            return type(module).__name__
        if node.op == "call_method":
            return str(node.target)
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            return f"{node.args[0].name}[{node.args[1]}]"
        return str(getattr(node.target, "__name__", node.target)).removeprefix("_")


def _is_tucked(node: fx.Node) -> bool:
    """Whether the node is shown as a part of another: attributes, finalize, vectors, and the outputs of fused nodes."""
    if node.op == "get_attr" or node.meta.get("bnr_vector") or node.target in (ops.finalize, ops.own_gradient, synchronise):
        return True
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0].target in OUTPUTS
    return getattr(node.target, "__name__", "") == "_item" and _is_merged_vector(node)


def is_vector_item(node: fx.Node) -> bool:
    """An element of synchronise's result."""
    return bool(node.args) and isinstance(node.args[0], fx.Node) and node.args[0].target is synchronise


def _data_inputs(node: fx.Node) -> list[fx.Node]:
    """The activations that a node reads; per-channel vectors and parameters left out, buffers too where a slice of them is written."""
    if is_fused(node) and node.target in OUTPUTS:
        names = ("x", "y", "r", "gate", *(["into"] if _appends(node) else []))
        return [v for k in names if isinstance(v := node.kwargs.get(k), fx.Node)]
    if node.target is ops.concat_buffer:
        return [v for v in node.args[:1] if isinstance(v, fx.Node)]
    return node.all_input_nodes


def _appends(node: fx.Node) -> bool:
    """Whether a convolution writes behind what is in a buffer: what it returns is then everything up to there."""
    return node.target is ops.conv and isinstance(node.kwargs["into"], fx.Node) and node.kwargs["offset"] is None


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes that made this tensor: all writers of a buffer that stands for a concat of branches, else the one of _source."""
    source = _source(node)
    writers = [source]
    while not _appends(writers[-1]) and isinstance(into := writers[-1].kwargs.get("into"), fx.Node):
        writers.append(_source(into))
    return writers[::-1]


def _source(node: fx.Node) -> fx.Node:
    """The node that made this tensor: behind outputs of fused nodes, and behind readers that pass it on."""
    while True:
        if node.target is ops.own_gradient:
            node = node.args[0]  # type: ignore[assignment]
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in OUTPUTS:
            fused = node.args[0]
            passed = produced_by(node, fused.target, "x") is not None
            node = fused.kwargs["x"] if passed else fused  # type: ignore[assignment]
            if not passed:
                return node
        else:
            return node


def _normalised_sites(node: fx.Node) -> list[str]:
    """The sites whose normalisation this node applies: as recorded, else those whose scale it reads (a squeeze, say)."""
    recorded = node.meta.get("bnr_normalises")
    if recorded is not None:
        return list(recorded)
    sites: list[str] = []
    stack = [node.kwargs.get("scale")]
    while stack:
        vector = stack.pop()
        if isinstance(vector, fx.Node):
            made = produced_by(vector, ops.finalize, "scale")
            if made is not None and "bnr_site" in made.meta:
                sites.append(made.meta["bnr_site"])
            elif vector.meta.get("bnr_vector") or vector.target is torch.cat:
                stack += reversed(vector.all_input_nodes)
    return sites


def _notes(node: fx.Node, group: str) -> list[str]:
    kwargs, notes = node.kwargs, []
    if kwargs.get("thread"):
        notes.append("passes its input on")
    if node.target is ops.conv and isinstance(kwargs["into"], fx.Node):
        place = "appended" if _appends(node) else f"channels {kwargs['offset']}.."
        notes.append(f"written into {_buffer_name(kwargs['into'], group)}, {place}")
    elif node.target is ops.conv and kwargs["channels"] is not None:
        notes.append(f"starts a buffer of {kwargs['channels']} channels, at {kwargs['offset']}")
    if kwargs.get("gain") is True:
        notes.append("applies s in backward")
    return notes


def _part_of_reason(reason: str | None, node: fx.Node) -> str | None:
    """A plan gives a reason for each half of a site; a node that stands alone is one of the halves."""
    word = "statistics" if node.target is ops.statistics else "normalised"
    parts = [part for part in (reason or "").split("; ") if word in part]
    return "; ".join(parts) or reason


def _buffer_name(tensor: fx.Node, group: str) -> str:
    """``the buffer of branch1.conv``: named after the node that allocated the memory in which this tensor lies."""
    node = _source(tensor)
    while isinstance(into := node.kwargs.get("into"), fx.Node):
        node = _source(into)
    return "the buffer" if node.target is ops.concat_buffer else f"the buffer of {relative(module_path(node), group)}"


def _buffer_words(node: fx.Node) -> str:
    if isinstance(node.kwargs.get("into"), fx.Node):
        return f"copied into a buffer, channels {node.kwargs['offset']}.."
    extra = node.kwargs.get("extra")
    return f"buffer, {extra} channels to come" if extra else f"buffer of {node.kwargs['channels']} channels"


def _by(sizes: object) -> str:
    """``3x3``."""
    return "x".join(str(s) for s in sizes)  # type: ignore[attr-defined]


def _strided(stride: object) -> str:
    """`` /2``, or nothing for stride 1."""
    sizes = list(stride)  # type: ignore[call-overload]
    if all(s == 1 for s in sizes):
        return ""
    return f" /{sizes[0] if len(set(sizes)) == 1 else _by(sizes)}"
