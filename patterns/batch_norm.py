"""Sites: every call of a batch norm that normalises with batch statistics. The paper's CONV-BN-ReLU starts here."""

from __future__ import annotations

from torch import fx

from bnrestructure.graph.layers import BatchNormLayer, batch_norm_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.patterns.base import Refusal

__all__ = ["batch_norm", "site_names"]


def batch_norm(node: fx.Node) -> BatchNormLayer | Refusal | None:
    """A batch norm call, module or functional form; refused: frozen, hooked, subclassed, or sharing memory with an in-place operation."""
    layer = batch_norm_of(node)
    if layer is None:
        return None
    if isinstance(layer, str):
        return Refusal(node, layer)
    changed_by = provenance(layer.input).changed_by or provenance(node).changed_by
    return layer if changed_by is None else Refusal(node, f"its memory is shared with a tensor that {changed_by} changes in place")


def site_names(graph: fx.Graph) -> list[str]:
    """The names of all batch norm calls of a prepared graph, in order, refused ones included."""
    return [provenance(node).site or node.name for node in graph.nodes if batch_norm(node) is not None]
