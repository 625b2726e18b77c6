"""fission: BN -> statistics, finalize, normalise (the paper's section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import output
from bnrestructure.graph.layers import module_path, reference
from bnrestructure.ops.synchronise import synchronise
from bnrestructure.passes.base import Fuel, PassResult, finish
from bnrestructure.patterns.batch_norm import BatchNormMatch, find_batch_norms

__all__ = ["Fission"]


@dataclass(frozen=True)
class Fission:
    """``z = batch_norm(y)`` -> ``mean, var = statistics(y); scale, beta = finalize(...); z = normalise(y, mean, scale, beta)``.

    SyncBatchNorm gains a step between the first two that merges the statistics of all ranks.
    """

    name: ClassVar[str] = "fission"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        count = 0
        for match in find_batch_norms(graph_module):
            if isinstance(match, BatchNormMatch) and self.fuel.take():
                _split(graph_module.graph, match)
                count += 1
        return finish(graph_module, count)


def _split(graph: fx.Graph, match: BatchNormMatch) -> None:
    node, layer = match.node, match.layer
    site = node.meta.get("bnr_site", module_path(node))
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "process_group")
    weight, bias, running_mean, running_var, tracked, group = (
        reference(graph, getattr(layer, name), node) for name in names
    )
    source = node.args[0] if node.args else node.kwargs["input"]  # layer.input may be a batch norm that has been split since
    with graph.inserting_before(node):
        statistics = graph.call_function(ops.statistics, (), {"x": source, "thread": False})
    mean, var, size = (output(statistics, name) for name in ("mean", "var", "size"))
    with graph.inserting_before(node):
        if layer.synchronised:
            merged = graph.call_function(synchronise, (mean, var, size, group))
            mean, var, size = (graph.call_function(_item, (merged, i)) for i in range(3))
        arguments = (mean, var, size, weight, bias, running_mean, running_var, tracked, layer.momentum, layer.eps)
        finalize = graph.call_function(ops.finalize, arguments, {"dimensions": layer.dimensions})
    scale, beta = output(finalize, "scale"), output(finalize, "beta")
    with graph.inserting_before(node):
        vectors = {"mean": mean, "scale": scale, "beta": beta}
        normalise = graph.call_function(ops.normalise, (), {"x": source, **vectors, "act": "identity", "thread": False})
    statistics.meta["bnr_statistics_of"] = [site]
    finalize.meta["bnr_site"] = site
    normalise.meta["bnr_normalises"] = [site]
    for fused in (statistics, finalize, normalise):
        fused.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    z = output(normalise, "z")
    z.meta["bnr_module"] = module_path(node)
    node.replace_all_uses_with(z)
    graph.erase_node(node)


def _item(values: tuple[object, ...], index: int) -> object:
    return values[index]
