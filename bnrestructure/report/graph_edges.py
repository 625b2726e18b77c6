"""Who reads whose tensor, seen through chains, buffers and the outputs of fused nodes."""

from __future__ import annotations

import torch
from torch import fx

from bnrestructure.graph.chains import passed_tensor
from bnrestructure.graph.ir import (
    ConcatBuffer,
    Conv,
    Finalize,
    Normalise,
    OwnGradient,
    Reader,
    Residual,
    Squeeze,
    Statistics,
    Synchronise,
    Unchanged,
    Writer,
    buffer_writer,
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
            read = [view.y, view.gate, view.r]
        case Normalise():
            read = [view.x, view.gate, view.factor, view.r, view.into if view.appends else None]
        case Reader() | Statistics() | ConcatBuffer():
            read = [view.x]
        case _:
            read = [*node.all_input_nodes]
    return [value for value in read if value is not None]


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that made this tensor: several, where it is a buffer that branches wrote their slices of."""
    node = passed_tensor(node)
    writers = [source_of(node)]
    while True:
        view = buffer_writer(node)
        appends = isinstance(view, Writer) and view.appends
        if appends or view is None or view.into is None:
            return writers[::-1]
        node = passed_tensor(view.into)
        writers.append(source_of(node))


def source_of(node: fx.Node) -> fx.Node:
    """The node that made this tensor: behind outputs of fused nodes, and behind readers that pass it on."""
    while True:
        node = passed_tensor(node)
        maker, output = maker_of(node)
        if maker is None or output is None:
            return node
        if not isinstance(maker, Squeeze) or output != "deferred":
            return maker.node
        node = maker.x


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
