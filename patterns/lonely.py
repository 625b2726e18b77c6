"""BN alone: a split batch norm of which neither half found a neighbour to ride on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure.graph.ir import Finalize, Normalise, Statistics

__all__ = ["LonelyBatchNorm", "lonely_batch_norm"]


@dataclass(frozen=True)
class LonelyBatchNorm:
    """statistics -> finalize -> normalise, each read by the next alone, none of them part of another node.

    The tensor itself may have other readers, handed on to them by a chain through normalise.
    """

    statistics: Statistics
    finalize: Finalize
    normalise: Normalise


def lonely_batch_norm(node: fx.Node) -> LonelyBatchNorm | None:
    """A batch norm that fission split for nothing, found at its normalise."""
    normalise = Normalise.of(node)
    if normalise is None or not normalise.is_plain or "z" not in normalise.outs():
        return None
    finalize = Finalize.making(normalise.scale, "scale")
    statistics = None if finalize is None else Statistics.making(finalize.mean, "mean")
    if finalize is None or statistics is None:
        return None
    same_tensor = normalise.x in (statistics.x, statistics.outs().get("passed"))
    readers = {reader for half in (statistics, finalize) for item in half.outs().values() for reader in item.users}
    own = {finalize.node, normalise.node}
    return LonelyBatchNorm(statistics, finalize, normalise) if same_tensor and readers <= own else None
