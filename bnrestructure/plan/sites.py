"""Reading the sites of a plan off one rewritten graph: where each half of each batch norm ended up, and why not on a neighbour."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import fx

from bnrestructure.graph.chains import readers_along_chain
from bnrestructure.graph.ir import AvgPool, BatchNorm, Conv, MaxPool, Normalise, Residual, Squeeze, Statistics, fused_of, is_fused
from bnrestructure.graph.layers import is_depthwise, shape_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.graph.view import Fused
from bnrestructure.graph.words import describe
from bnrestructure.patterns.base import refused_at
from bnrestructure.patterns.batch_norm import batch_norm
from bnrestructure.patterns.pairs import CONV_STATISTICS
from bnrestructure.plan.plan import Site

__all__ = ["kept_site", "sites_of"]

# Sweeps over the normalised tensor in one training step, beyond the convolutions' own reads and writes. Before: BN reads twice and writes
# (3), its backward reads gradient and input twice and writes (5); an activation out of place adds 2 and 3.
_BEFORE_BATCH_NORM, _BEFORE_ACTIVATION = 8, 5
# After: an epilogue costs nothing forward and one read of y in backward; a prologue one read of x in the dgrad epilogue; sweeps of their
# own read and write (statistics 1 + 3, normalise 2 + 3), of which a concat would do the forward part anyway. Behind a residual with a gate
# one more sweep has the gate's gradient (3).
_AFTER_STATISTICS = {"epilogue": 1, "shared": 0, "sweep": 4}
_AFTER_NORMALISE = {"prologue": 1, "concat": 3, "gated sum": 4, "sweep": 5}

_LONELY = "neither half has a neighbour to ride on: no convolution before it, and none (nor a pool or a residual join) after it"

#: How a plan names what reads a normalised tensor.
_READERS = {MaxPool: "max_pool", AvgPool: "avg_pool", Squeeze: "avg_pool", Normalise: "other"}


def kept_site(name: str, reason: str, ran: bool | None = None) -> Site:
    """A batch norm that was left as it is."""
    return Site(name, "bn", "kept", reason, sweeps_before=_BEFORE_BATCH_NORM, sweeps_after=_BEFORE_BATCH_NORM, ran=ran)


def sites_of(path: str, names: Sequence[str], gm: fx.GraphModule) -> Iterator[Site]:
    """The sites of the region at ``path``: those of these names in its prepared graph, as they are in its rewritten one."""
    prefix = f"{path}." if path else ""
    graph = gm.graph
    statistics, normalises = defaultdict(list), defaultdict(list)
    kept: dict[str, str] = {}
    for node in graph.nodes:
        known = provenance(node)
        if BatchNorm.of(node) is not None and known.site is not None:
            kept[known.site] = _LONELY
        elif known.site is not None and not is_fused(node):
            kept[known.site] = "the passes that were asked for leave it"
        for site in known.statistics_of if is_fused(node) else ():
            statistics[site].append(node)
        for site in known.normalises if is_fused(node) else ():
            normalises[site].append(node)
    kept |= {provenance(r.node).site or r.node.name: r.reason for r in refused_at(batch_norm, graph.nodes)}
    refused = {r.node: r.reason for r in refused_at(CONV_STATISTICS, (s.node for s in Statistics.every(graph)))}
    swept: set[fx.Node] = set()
    for name in names:
        if name in kept:
            yield kept_site(prefix + name, kept[name])
        else:
            yield _site(prefix + name, statistics[name], normalises[name], refused, swept)


def _site(name: str, statistics: list[fx.Node], normalises: list[fx.Node], refused: dict[fx.Node, str], swept: set[fx.Node]) -> Site:
    """One site, from the nodes that carry its halves. ``swept`` are statistics that another site counts already."""
    own_sweeps = [n for n in statistics if Statistics.of(n) is not None and n not in swept]
    swept.update(own_sweeps)
    reasons = [f"its statistics take a sweep: {refused.get(node, 'fuse-statistics was not run')}" for node in own_sweeps]
    shared = len(statistics) > 1 or any(Statistics.of(n) is not None and provenance(n).shared_statistics for n in statistics)
    where = "sweep" if own_sweeps else "shared" if shared else "epilogue"
    readers = [view for node in normalises if (view := fused_of(node)) is not None]
    act = getattr(readers[0], "act", "identity") if readers else "identity"
    alone = [view for view in readers if isinstance(view, Normalise) and view.is_alone]
    in_concat = any(isinstance(view, Normalise) and view.in_buffer for view in readers)
    in_gated_sum = any(view.forms_residual and getattr(view, "gate", None) is not None for view in readers)
    for normalise in alone:
        z = normalise.outs().get("z")
        wanted = sorted({describe(reader) for reader in readers_along_chain(z)}) if z is not None else []
        what = "normalised" if normalise.gate is None else "normalised and gated"
        reasons.append(f"its {what} tensor is kept in memory for {', '.join(wanted) or 'nobody'}")
    rides_statistics, rides_normalise = not own_sweeps, not alone and bool(readers)
    before = _BEFORE_BATCH_NORM + (0 if act == "identity" else _BEFORE_ACTIVATION)
    applied = "sweep" if alone else "gated sum" if in_gated_sum else "concat" if in_concat else "prologue"
    after = _AFTER_STATISTICS[where] + _AFTER_NORMALISE[applied]
    return Site(
        name=name,
        pattern=_pattern(statistics, shared, act, readers),
        status="fused" if rides_statistics and rides_normalise else "partial" if rides_statistics or rides_normalise else "kept",
        reason="; ".join(reasons) or None,
        statistics=", ".join(sorted({_label(n) for n in statistics})[:3]) or None,
        normalise=", ".join(_label(n) for n in normalises[:3]) or None,
        sweeps_before=before,
        sweeps_after=min(after, before),
    )


def _label(node: fx.Node) -> str:
    return provenance(node).module or node.name


def _pattern(statistics: list[fx.Node], shared: bool, act: str, readers: list[Fused]) -> str:
    """What stands before and after a batch norm: ``conv-bn-relu-conv``."""
    if shared and len(statistics) > 1:
        start = "concat"
    elif statistics and all(Conv.of(node) is not None for node in statistics):
        start = "conv"
    else:
        start = "add" if any(Residual.of(node) is not None for node in statistics) else "any"
    ends = list(dict.fromkeys(_reader_word(reader) for reader in readers))
    added = any(reader.forms_residual for reader in readers)  # the activation is then the residual's
    middle = [] if act == "identity" or added else [act.split("(")[0]]
    return "-".join([start, "bn", *middle, "|".join(ends) or "other"])


def _reader_word(reader: Fused) -> str:
    if isinstance(reader, Normalise) and not reader.is_alone:
        return "add" if reader.r is not None else "concat" if reader.in_buffer else "mul"
    if isinstance(reader, Residual | Conv) and reader.forms_residual:
        return "add" if reader.act == "identity" else f"add-{reader.act.split('(')[0]}"
    if isinstance(reader, Conv):
        word = "depthwise" if is_depthwise(shape_of(reader.weight), reader.groups) else "conv"
        return word if reader.gate is None else f"squeeze-excite-{word}"
    return _READERS[type(reader)]
