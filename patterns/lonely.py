"""BN alone: a split batch norm of which neither half found a neighbour to ride on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import is_fused, outputs_of, produced_by

__all__ = ["LonelyBatchNorm", "find_lonely"]


@dataclass(frozen=True)
class LonelyBatchNorm:
    """statistics -> finalize -> normalise, each read by the next alone, none of them part of another node.

    The tensor itself may have other readers, handed on to them by a thread through normalise.
    """

    statistics: fx.Node
    finalize: fx.Node
    normalise: fx.Node


def find_lonely(gm: fx.GraphModule) -> list[LonelyBatchNorm]:
    """Every batch norm that fission split for nothing."""
    found = []
    for normalise in gm.graph.nodes:
        if not is_fused(normalise, ops.normalise) or set(outputs_of(normalise)) not in ({"z"}, {"z", "x"}):
            continue
        finalize = produced_by(normalise.kwargs["scale"], ops.finalize, "scale")
        statistics = produced_by(normalise.kwargs["mean"], ops.statistics, "mean")
        if finalize is None or statistics is None:
            continue
        own = {finalize, normalise}
        readers = {u for node in (statistics, finalize) for item in outputs_of(node).values() for u in item.users}
        same_tensor = normalise.kwargs["x"] in (statistics.kwargs["x"], outputs_of(statistics).get("x"))
        same = finalize.args[0] is normalise.kwargs["mean"] and same_tensor
        if same and readers <= own:
            found.append(LonelyBatchNorm(statistics, finalize, normalise))
    return found
