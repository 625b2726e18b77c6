"""Who reads whose tensor, seen through threads, buffers and the outputs of fused nodes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import OUTPUTS, is_fused, produced_by
from bnrestructure.ops.synchronise import synchronise

__all__ = ["appends", "data_inputs", "is_tucked", "normalised_sites", "source_of", "sources_of"]


def is_tucked(node: fx.Node) -> bool:
    """Whether the node is shown as a part of another: attributes, finalize, vectors, the outputs of fused nodes."""
    tucked = (ops.finalize, ops.own_gradient, synchronise)
    if node.op == "get_attr" or node.meta.get("bnr_vector") or node.target in tucked:
        return True
    owner = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(owner, fx.Node):
        return False
    return owner.target is synchronise or (node.target is operator.getitem and owner.target in OUTPUTS)


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The activations that a node reads: no parameters or vectors, and no buffer of which it writes a slice."""
    if is_fused(node) and node.target in OUTPUTS:
        names = ("x", "y", "r", "gate", *(["into"] if appends(node) else []))
        return [v for k in names if isinstance(v := node.kwargs.get(k), fx.Node)]
    if node.target is ops.concat_buffer:
        return [v for v in node.args[:1] if isinstance(v, fx.Node)]
    return node.all_input_nodes


def appends(node: fx.Node) -> bool:
    """Whether a convolution writes behind what is in a buffer: what it returns is then everything up to there."""
    return node.target is ops.conv and isinstance(node.kwargs["into"], fx.Node) and node.kwargs["offset"] is None


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that made this tensor: several, where it is a buffer that branches wrote their slices of."""
    writers = [source_of(node)]
    while not appends(writers[-1]) and isinstance(into := writers[-1].kwargs.get("into"), fx.Node):
        writers.append(source_of(into))
    return writers[::-1]


def source_of(node: fx.Node) -> fx.Node:
    """The node that made this tensor: behind outputs of fused nodes, and behind readers that pass it on."""
    while True:
        if node.target is ops.own_gradient:
            node = node.args[0]  # type: ignore[assignment]
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in OUTPUTS:
            fused = node.args[0]
            # a convolution that forms a residual join passes on the sum, which it made
            passed = produced_by(node, fused.target, "x") is not None and fused.kwargs.get("r") is None
            node = fused.kwargs["x"] if passed else fused  # type: ignore[assignment]
            if not passed:
                return node
        else:
            return node


def normalised_sites(node: fx.Node) -> list[str]:
    """The sites whose normalisation this node applies: as recorded, else those whose scale it reads."""
    recorded = node.meta.get("bnr_normalises")
    if recorded is not None:
        return list(recorded)
    sites: list[str] = []
    stack = [node.kwargs.get("scale")]
    while stack:
        vector = stack.pop()
        if isinstance(vector, fx.Node):
            made = produced_by(vector, ops.finalize, "scale")
            if made is not None and "bnr_site" in made.meta:
                sites.append(made.meta["bnr_site"])
            elif vector.target is not ops.unchanged and (vector.meta.get("bnr_vector") or vector.target is torch.cat):
                stack += reversed(vector.all_input_nodes)
    return sites
