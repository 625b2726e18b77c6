"""A captured or rewritten graph as people think of it: one entry for each layer, and on it what rides along."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from bnrestructure.graph.activations import activation_of
from bnrestructure.graph.ir import BatchNorm, Conv, Normalise, Reader, Residual, Statistics, fused_of, is_fused
from bnrestructure.graph.layers import ConvLayer, batch_norm_of, conv_of
from bnrestructure.graph.operations import AveragePooling, MaxPooling, add_of, concat_of, pooling_of
from bnrestructure.graph.order import is_size_read
from bnrestructure.graph.provenance import module_path, provenance
from bnrestructure.graph.view import Fused
from bnrestructure.plan.plan import Site
from bnrestructure.report.graph_backward import backward_of
from bnrestructure.report.graph_edges import data_inputs, is_tucked, normalised_sites, source_of, sources_of
from bnrestructure.report.graph_words import by, conv_words, fused_words, notes_of, part_of_reason, plain_words, strided
from bnrestructure.report.names import shortened

__all__ = ["Entry", "RegionView", "view_region"]


@dataclass
class Entry:
    """One line of a shown graph.

    id, kind         the node's name in the fx graph; what it is: conv, bn, act, add, concat, pool, sweep, buffer,
                     input, output, other
    module           path of the original module, or of the one whose forward() calls it; ``group`` is the module that
                     it is shown in
    name, what       name inside the group; a few words: ``conv 3x3 64->64 /2``
    inputs           ids of the entries that it reads; ``shortcut`` is the one among them that a residual join adds
    prologue         what is applied to its input as it is read: ``bn1 norm + relu``, and the sites in question
    epilogue         what is computed of its result on the way out: ``bn2 statistics``
    notes            chains, shared buffers, gains
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
        self.modules: dict[str, nn.Module] = dict(gm.named_modules(remove_duplicate=False))
        self.sites = sites
        self.sizes: set[fx.Node] = set()  # nodes that compute shapes, not tensors

    def entry(self, node: fx.Node) -> Entry | None:
        """The entry for this node, or None for what is tucked into others and for arithmetic on shapes."""
        if is_tucked(node) or self._is_size(node):
            return None
        entry = self._described(node)
        sources = [source for n in data_inputs(node) for source in sources_of(n)]
        shown = [source for source in sources if not is_tucked(source) and source not in self.sizes]
        entry.inputs = list(dict.fromkeys(source.name for source in shown))
        entry.backward = backward_of(node, entry.prologue_sites, entry.epilogue_sites, entry.group)
        return entry

    def _is_size(self, node: fx.Node) -> bool:
        """Whether the node is arithmetic on shapes: of no interest to a reader of the graph."""
        made = is_size_read(node) or (node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"))
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        derived = node.op == "call_function" and bool(sources) and all(n in self.sizes for n in sources)
        if made or derived:
            self.sizes.add(node)
        return made or derived

    def _described(self, node: fx.Node) -> Entry:
        if node.op in ("placeholder", "output"):
            kind = "input" if node.op == "placeholder" else "output"
            return Entry(node.name, kind, "", "", node.name, "input" if kind == "input" else "")
        view = fused_of(node)
        if view is not None and is_fused(node):
            return self._fused(view)
        layer = conv_of(node)
        if isinstance(layer, ConvLayer):
            return self._new(node, "conv", conv_words(layer))
        if batch_norm_of(node) is not None or isinstance(view, BatchNorm):
            return self._batch_norm(node)
        activation = activation_of(node)
        if activation is not None:
            return self._new(node, "act", activation.name)
        if add_of(node) is not None:
            return self._new(node, "add", "add")
        segments = concat_of(node)
        if segments is not None:
            return self._new(node, "concat", f"concat of {len(segments)}")
        pool = pooling_of(node)
        if isinstance(pool, MaxPooling | AveragePooling):
            kind = "max" if isinstance(pool, MaxPooling) else "average"
            return self._new(node, "pool", f"{kind} pool {by(pool.kernel)}{strided(pool.stride)}")
        return self._new(node, "other", plain_words(node))

    def _new(self, node: fx.Node, kind: str, what: str) -> Entry:
        path = module_path(node)
        module = self.modules.get(path)
        # called by that module's forward(), or the module itself
        inside = module is None or bool(list(module.children()))
        if path == node.name and path not in self.modules:
            path = ""
        group, _, name = (path, "", "") if inside else path.rpartition(".")
        if kind == "buffer" or what == "statistics":
            name = ""  # a pass put it there; the module in its stack is the one that made the tensor
        return Entry(node.name, kind, path, group, name or ("buffer" if kind == "buffer" else what.split(" ")[0]), what)

    def _batch_norm(self, node: fx.Node) -> Entry:
        whole = BatchNorm.of(node)
        act = "identity" if whole is None else whole.act
        site = provenance(node).site or module_path(node)
        what = "batch norm" if act == "identity" else f"batch norm + {act}"
        group, _, name = site.rpartition(".") if site.split("#")[0] in self.modules else ("", "", node.name)
        entry = Entry(node.name, "bn", site, group, name, what)
        planned = self.sites.get(self.prefix + site)
        if planned is not None and planned.status == "kept":
            entry.status, entry.reason = "kept", planned.reason
        return entry

    def _fused(self, view: Fused) -> Entry:
        node = view.node
        entry = self._new(node, *fused_words(view))
        entry.prologue_sites = normalised_sites(node)
        entry.epilogue_sites = list(provenance(node).statistics_of)
        if isinstance(view, Conv | Residual | Normalise) and view.r is not None:
            entry.shortcut = source_of(view.r).name
        entry.prologue = _prologue(view, shortened(entry.prologue_sites, entry.group))
        if entry.epilogue_sites:
            entry.epilogue = f"{shortened(entry.epilogue_sites, entry.group)} statistics"
        entry.notes = notes_of(view, entry.group)
        alone = entry.epilogue_sites if isinstance(view, Statistics) else entry.prologue_sites if isinstance(view, Normalise) else []
        for site in alone:
            planned = self.sites.get(self.prefix + site)
            if planned is not None and planned.status != "fused":
                entry.status, entry.reason = planned.status, part_of_reason(planned.reason, node)
        return entry


def _prologue(view: Fused, sites: str) -> str | None:
    """What a node applies to its input as it reads it; ``sites`` are the names of the batch norms."""
    parts = [f"{sites} norm"] if sites else []
    gate = " * gate" if isinstance(view, Conv | Normalise | Residual) and view.gate is not None else ""
    if isinstance(view, Conv) and view.forms_residual:
        parts = [*(f"{part}{gate}" for part in parts), "shortcut"]
        gate = ""
    if isinstance(view, Reader) and view.act != "identity":
        parts.append(view.act)
    drawn = " * factor" if isinstance(view, Normalise) and view.factor is not None else ""
    added = " + shortcut" if isinstance(view, Normalise) and view.r is not None else ""
    return f"{' + '.join(parts)}{gate}{drawn}{added}".strip() or None
