"""A few words for what a node is, for reasons that a user reads."""

from __future__ import annotations

from torch import fx

from bnrestructure.graph.ir import ConcatBuffer, is_fused, maker_of
from bnrestructure.graph.layers import module_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.ops.formats import returned

__all__ = ["describe"]


def describe(node: fx.Node) -> str:
    """What computes this node's tensor."""
    if node.op == "placeholder":
        return "the region's input"
    if node.op == "call_module":
        return f"{type(module_of(node)).__name__} {node.target}"
    if node.op == "get_attr":
        return f"the attribute {node.target}"
    if node.op == "output":
        return "the caller"
    if node.target is returned:
        return "the caller and the layers behind it"
    maker, _ = maker_of(node)
    if isinstance(maker, ConcatBuffer):  # a segment of a concat that is copied
        return "cat"
    if maker is not None and is_fused(maker.node):
        node = maker.node
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    module = provenance(node).module
    return str(name) if module is None else f"{name} {module}"
