"""Who reads whose tensor, seen through chains, buffers and the outputs of fused nodes."""

from __future__ import annotations

import torch
from torch import fx

from bnrestructure.graph.ir import (
    ConcatBuffer,
    Conv,
    Finalize,
    Link,
    Normalise,
    OwnGradient,
    Reader,
    Residual,
    Squeeze,
    Statistics,
    Synchronise,
    Unchanged,
    fused_of,
    maker_of,
)
from bnrestructure.graph.provenance import provenance

__all__ = ["data_inputs", "is_tucked", "normalised_sites", "source_of", "sources_of"]


def is_tucked(node: fx.Node) -> bool:
    """Whether the node is shown as a part of another: attributes, finalize, vectors, the outputs of fused nodes."""
    if node.op == "get_attr" or provenance(node).vector or isinstance(fused_of(node), Finalize | OwnGradient | Synchronise):
        return True
    return maker_of(node)[1] is not None


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The activations that a node reads: no parameters or vectors, and no buffer of which it writes a slice."""
    view = fused_of(node)
    match view:
        case Conv():
            read = [view.x, view.r, view.gate, view.into if view.appends else None]
        case Residual():
            read = [view.y, view.r]
        case Normalise():
            read = [view.x, view.gate, view.r]
        case Reader() | Statistics() | ConcatBuffer():
            read = [view.x]
        case _:
            read = [*node.all_input_nodes]
    return [value for value in read if value is not None]


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that made this tensor: several, where it is a buffer that branches wrote their slices of."""
    writers = [source_of(node)]
    while True:
        view = fused_of(writers[-1])
        appends = isinstance(view, Conv) and view.appends
        if appends or not isinstance(view, Conv | ConcatBuffer) or view.into is None:
            return writers[::-1]
        writers.append(source_of(view.into))


def source_of(node: fx.Node) -> fx.Node:
    """The node that made this tensor: behind outputs of fused nodes, and behind readers that pass it on."""
    while True:
        maker, output = maker_of(node)
        if isinstance(maker, OwnGradient):
            node = maker.x
        elif maker is None or output is None:
            return node
        elif (isinstance(maker, Link) and output == "passed" and maker.passes_x) or (isinstance(maker, Squeeze) and output == "deferred"):
            node = maker.x
        else:
            return maker.node


def normalised_sites(node: fx.Node) -> list[str]:
    """The sites whose normalisation this node applies: as recorded, else those whose scale it reads."""
    recorded = provenance(node).normalises
    if recorded:
        return list(recorded)
    view = fused_of(node)
    sites: list[str] = []
    stack = [view.scale] if isinstance(view, Reader) else []
    while stack:
        vector = stack.pop()
        maker, _ = maker_of(vector)
        if isinstance(maker, Finalize):
            site = provenance(maker.node).site
            sites += [] if site is None else [site]
        elif vector is not None and not isinstance(maker, Unchanged) and (provenance(vector).vector or vector.target is torch.cat):
            stack += reversed(vector.all_input_nodes)
    return sites
