"""Sites: every call of a batch norm that normalises with batch statistics. The paper's CONV-BN-ReLU starts here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure.graph.layers import BatchNormLayer, batch_norm_of, modules_of
from bnrestructure.patterns.base import Refusal

__all__ = ["BatchNormMatch", "find_batch_norms"]


@dataclass(frozen=True)
class BatchNormMatch:
    """One batch norm call, module or functional form."""

    node: fx.Node
    layer: BatchNormLayer


def find_batch_norms(gm: fx.GraphModule) -> list[BatchNormMatch | Refusal]:
    """All batch norm calls in graph order; refused: frozen, hooked, subclassed, or sharing memory with an in-place operation."""
    modules = modules_of(gm)
    found: list[BatchNormMatch | Refusal] = []
    for node in gm.graph.nodes:
        layer = batch_norm_of(node, modules)
        if layer is None:
            continue
        if isinstance(layer, str):
            found.append(Refusal(node, layer))
        elif "bnr_shared" in layer.input.meta or "bnr_shared" in node.meta:
            by = layer.input.meta.get("bnr_shared", node.meta.get("bnr_shared"))
            found.append(Refusal(node, f"its memory is shared with a tensor that {by} changes in place"))
        else:
            found.append(BatchNormMatch(node, layer))
    return found
