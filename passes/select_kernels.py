"""select-kernels: which implementation each fused node asks for, or back to unfused where nothing was won."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import OUTPUTS, is_fused, outputs_of, set_kwargs
from bnrestructure.passes.base import Fuel, PassResult, erase_dead, finish
from bnrestructure.patterns.lonely import LonelyBatchNorm, find_lonely

__all__ = ["SelectKernels"]


@dataclass(frozen=True)
class SelectKernels:
    """Stamp the backend on every fused node, and put batch norms together again whose halves found nothing to ride on.

    With ``auto`` and the device backends the final choice falls per call, when shape, dtype and device are known: the device's kernel where
    it supports the call, the reference where it does not (kernels/registry.py).
    """

    name: ClassVar[str] = "select-kernels"
    backend: str = "auto"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        graph, count = graph_module.graph, 0
        for lonely in find_lonely(graph_module):
            if self.fuel.take():
                _put_together(graph, lonely)
                count += 1
        for node in graph.nodes:
            fused = is_fused(node) and node.target in OUTPUTS
            if fused and node.kwargs.get("backend", "auto") != self.backend and self.fuel.take():
                set_kwargs(node, backend=self.backend)
                count += 1
        return finish(graph_module, count)


def _put_together(graph: fx.Graph, match: LonelyBatchNorm) -> None:
    x = match.statistics.kwargs["x"]  # normalise may read it through the statistics node's thread
    _, _, _, weight, bias, running_mean, running_var, tracked, momentum, eps = match.finalize.args
    with graph.inserting_before(match.normalise):
        whole = graph.call_function(
            ops.batch_norm,
            (x, weight, bias, running_mean, running_var, tracked, momentum, eps),
            {"act": match.normalise.kwargs["act"], "dimensions": match.finalize.kwargs.get("dimensions", ())},
        )
    whole.meta["bnr_kept"] = match.normalise.meta["bnr_normalises"]
    whole.meta["bnr_module"] = match.normalise.meta.get("bnr_module", whole.name)
    whole.meta["nn_module_stack"] = match.normalise.meta.get("nn_module_stack", {})
    results = outputs_of(match.normalise)
    results["z"].replace_all_uses_with(whole)
    if "x" in results:  # further readers had it through the thread
        assert isinstance(x, fx.Node)
        results["x"].replace_all_uses_with(x)
    erase_dead(
        graph, match.statistics, *outputs_of(match.statistics).values(), match.finalize,
        *outputs_of(match.finalize).values(), match.normalise, *results.values(),
    )  # fmt: skip
