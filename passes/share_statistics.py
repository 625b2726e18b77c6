"""share-statistics: each channel's statistics are computed once, however many batch norms read the channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import output, outputs_of
from bnrestructure.passes.base import Fuel, PassResult, finish
from bnrestructure.patterns.statistics import ConcatStatistics, find_concat_statistics

__all__ = ["ShareStatistics"]


@dataclass(frozen=True)
class ShareStatistics:
    """The statistics of a concat become the concat of its segments' statistics; equal statistics become one.

    Growing concats ([a], [a, b], [a, b, c] ... of a dense block) grow the per-channel vectors the same way, one segment a time.
    """

    name: ClassVar[str] = "share-statistics"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        count = 0
        for match in find_concat_statistics(graph_module):
            if self.fuel.take():
                _from_segments(graph_module.graph, match)
                count += 1
        count += self._merge_equal(graph_module.graph)
        return finish(graph_module, count)

    def _merge_equal(self, graph: fx.Graph) -> int:
        """Several statistics nodes of one tensor: keep the first."""
        first: dict[fx.Node, fx.Node] = {}
        count = 0
        for node in list(graph.nodes):
            if node.target is not ops.statistics or node.op != "call_function":
                continue
            source = node.kwargs["x"]
            kept = first.setdefault(source, node)
            if kept is node or not self.fuel.take():
                continue
            for name, item in list(outputs_of(node).items()):
                item.replace_all_uses_with(output(kept, name))
                graph.erase_node(item)
            kept.meta["bnr_statistics_of"] = [*kept.meta["bnr_statistics_of"], *node.meta["bnr_statistics_of"]]
            graph.erase_node(node)
            count += 1
        return count


def _from_segments(graph: fx.Graph, match: ConcatStatistics) -> None:
    statistics = match.statistics
    parts = [_statistics_of(graph, segment, statistics) for segment in match.segments]
    items = outputs_of(statistics)
    for name in ("mean", "var"):
        if name in items:
            vector = _grown(graph, [output(part, name) for part in parts], items[name])
            items[name].replace_all_uses_with(vector)
            graph.erase_node(items[name])
    if "size" in items:
        items["size"].replace_all_uses_with(output(parts[0], "size"))
        graph.erase_node(items["size"])
    for part in parts:
        part.meta["bnr_statistics_of"] = [*part.meta["bnr_statistics_of"], *statistics.meta["bnr_statistics_of"]]
        part.meta["bnr_shared_statistics"] = True
    graph.erase_node(statistics)


def _statistics_of(graph: fx.Graph, segment: fx.Node, before: fx.Node) -> fx.Node:
    """The statistics node of this tensor: an existing one if it stands before ``before``, else a new one behind the tensor.

    A tensor that is a fused node's output already carrying statistics is left to fuse-statistics, which drops duplicates.
    """
    for user in segment.users:
        if user.op == "call_function" and user.target is ops.statistics and user < before:
            return user
    position = segment
    while position.next.op in ("placeholder", "get_attr"):
        position = position.next
    with graph.inserting_after(position):
        node = graph.call_function(ops.statistics, (), {"x": segment, "thread": False})
    node.meta["bnr_statistics_of"] = []
    node.meta["nn_module_stack"] = segment.meta.get("nn_module_stack", {})
    return node


def _grown(graph: fx.Graph, parts: list[fx.Node], before: fx.Node) -> fx.Node:
    """The concat of per-channel vectors, as [the concat of all but the last] + [the last], sharing what is there already."""
    vector = parts[0]
    for part in parts[1:]:
        existing = next(
            (u for u in vector.users if u.target is torch.cat and u.args and list(u.args[0]) == [vector, part]),  # type: ignore[arg-type]
            None,
        )
        if existing is None:
            after = max((vector, part), key=_position(graph))
            with graph.inserting_after(after):
                existing = graph.call_function(torch.cat, ([vector, part],))
            existing.meta["bnr_vector"] = True
        vector = existing
    return vector


def _position(graph: fx.Graph):  # type: ignore[no-untyped-def]
    order = {node: i for i, node in enumerate(graph.nodes)}
    return lambda node: order[node]
