"""restore-formats: tensors go in eager's memory format to every opaque module call, random draw, write in place, and to the output.

Fused kernels answer in channels_last whatever the input's layout; a ``.view()`` in the user's own code would not bear that, nor would
a write through ``y.flatten(1)``, which is a view of y in one layout and a copy in another. The pass always runs, last, and is no rewrite
that a user can choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from bnrestructure.graph.boundaries import is_library_leaf
from bnrestructure.graph.ir import Conv, Finalize, has_fused
from bnrestructure.graph.layers import module_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.ops.formats import eager_format, eager_formats
from bnrestructure.passes.base import Pass, Rule

__all__ = ["RESTORE_FORMATS"]

#: Elementwise random numbers are drawn in memory order: in another layout the same seed would give another mask.
_RANDOM_FUNCTIONS = {
    torch.dropout, torch.dropout_, torch.alpha_dropout, torch.bernoulli, torch.rand_like, torch.randn_like, torch.rrelu,
    nn.functional.dropout, nn.functional.alpha_dropout, nn.functional.rrelu,
}  # fmt: skip
_RANDOM_MODULES = (nn.Dropout, nn.AlphaDropout, nn.RReLU)


@dataclass(frozen=True)
class Border:
    """A node that is not ours, and the tensors that it reads and that may be in another format than eager's."""

    node: fx.Node
    sources: list[fx.Node]


def border(node: fx.Node) -> Border | None:
    """A node for which a memory format matters, in a graph with fused nodes."""
    shared = provenance(node).changed_by is not None
    module = module_of(node)
    opaque = module is not None and (isinstance(module, _RANDOM_MODULES) or not is_library_leaf(module))
    draws = node.op == "call_function" and node.target in _RANDOM_FUNCTIONS
    if not (shared or opaque or draws or node.op == "output") or not has_fused(node.graph):
        return None
    sources = [source for source in node.all_input_nodes if not _is_eagers(source, shared)]
    return Border(node, sources) if sources else None


def _is_eagers(source: fx.Node, shared: bool) -> bool:
    """Whether this tensor needs no node of ours in front of its reader: the reader shares memory with it, or nothing has changed it."""
    known = source.op in ("placeholder", "get_attr") or source.target is eager_format
    return known or (shared and provenance(source).changed_by is not None)


def restore(match: Border) -> None:
    """Put a node in front of each tensor that is read."""
    graph = match.node.graph
    formats = _formats(graph)
    for source in match.sources:
        with graph.inserting_before(match.node):
            restored = graph.call_function(eager_format, (source, formats))
        match.node.replace_input_with(source, restored)


def _formats(graph: fx.Graph) -> fx.Node:
    """The node that finds out eager's formats at the start of each call."""
    existing = graph.find_nodes(op="call_function", target=eager_formats)
    if existing:
        return existing[0]
    arguments = tuple(graph.find_nodes(op="placeholder"))
    first_weights: dict[int, str] = {}  # of each number of dimensions: a model is in one format
    for conv in Conv.every(graph):
        if conv.weight.op == "get_attr":
            first_weights.setdefault(len(conv.stride), str(conv.weight.target))
    start = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(start):
        weights = tuple(graph.create_node("get_attr", target) for target in first_weights.values())
        return graph.call_function(eager_formats, (arguments, weights, _any_1d(graph)))


def _any_1d(graph: fx.Graph) -> bool:
    """Whether any node of ours answers in [N, C, L] or may do so: what a 1-D convolution or a BatchNorm1d became."""
    convs = any(len(conv.stride) == 1 for conv in Conv.every(graph))
    return convs or any(3 in finalize.dimensions for finalize in Finalize.every(graph))


RESTORE_FORMATS = Pass("restore-formats", (Rule(border, restore),))
