"""restore-formats: tensors go in eager's memory format to whatever sees memory: opaque calls, random draws, writes in place, the output.

Fused kernels answer in channels_last whatever the input's layout; a ``.view()`` in the user's own code would not bear that, nor would
a write through ``y.flatten(1)``, which is a view of y in one layout and a copy in another. The pass always runs, last, and is no rewrite
that a user can choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bnrestructure.graph.boundaries import is_library_leaf
from bnrestructure.graph.ir import has_fused
from bnrestructure.graph.layers import module_of
from bnrestructure.graph.provenance import Format, known_tensor, provenance, remember
from bnrestructure.graph.targets import called_name, is_custom_call
from bnrestructure.ops.formats import eager_format, order_of, returned
from bnrestructure.passes.base import Pass, Rule

__all__ = ["RESTORE_FORMATS", "formats_read", "note_formats"]

#: Elementwise random numbers are drawn in memory order: in another layout the same seed would give another mask. Functions, methods and
#: operators of these names.
_RANDOM = {
    "dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "native_dropout", "gumbel_softmax", "rrelu", "rrelu_", "rrelu_with_noise",
    "rand_like", "randn_like", "randint_like", "empty_like", "bernoulli", "bernoulli_", "normal_", "uniform_", "random_", "exponential_",
    "geometric_", "log_normal_", "cauchy_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
    "uniform", "exponential", "normal_functional",
}  # fmt: skip
_RANDOM_MODULES = (nn.Dropout, nn.AlphaDropout, nn.RReLU)
#: take_along_dim and kron call view() inside.
_OF_STRIDES = {
    "as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "view_as_complex", "take_along_dim", "kron", "resize_",
    "resize_as_", "_unsafe_view", "_reshape_alias",
}  # fmt: skip


def note_formats(graph: fx.Graph) -> None:
    """Every node of a captured graph remembers the formats of the tensors that it reads."""
    for node in graph.nodes:
        remember(node, formats=tuple(_format_of(source) for source in _sources(node)))


def formats_read(node: fx.Node) -> dict[fx.Node, Format | None]:
    """The formats of the tensors that this node reads, as eager has them."""
    return dict(zip(_sources(node), provenance(node).formats, strict=False))


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, in the order of its arguments, each as often as it is read."""
    return [a for a in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(a, fx.Node)]


def _format_of(source: fx.Node) -> Format | None:
    known = known_tensor(source)
    if known is None or not hasattr(known, "shape"):
        return None
    stride = known.stride if isinstance(known.stride, tuple) else known.stride() if known.layout is torch.strided else ()
    return order_of([_number(n) for n in known.shape], [_number(n) for n in stride]) if stride else None


def _number(n: Any) -> int:
    """A size, or under torch.compile the one that a symbol was met with."""
    return int(cast(int, n.node.hint)) if isinstance(n, torch.SymInt) else int(n)


@dataclass(frozen=True)
class Border:
    """A node that is not ours, and the tensors that it reads and that may be in another format than eager's, with that one."""

    node: fx.Node
    sources: dict[fx.Node, Format]


def border(node: fx.Node) -> Border | None:
    """A node for which a memory format matters, in a graph with fused nodes."""
    shared = provenance(node).changed_by is not None
    leaves = node.op == "output" or node.target is returned
    if not (shared or leaves or _is_opaque(node) or _goes_by_strides(node) or _draws(node)) or not has_fused(node.graph):
        return None
    sources = {source: order for source, order in formats_read(node).items() if order is not None and not _is_eagers(source, shared)}
    return Border(node, sources) if sources else None


def _is_opaque(node: fx.Node) -> bool:
    """Whether somebody's own code gets the tensors: a module's, a custom autograd Function's."""
    module = module_of(node)
    return is_custom_call(node) or (module is not None and not is_library_leaf(module))


def _goes_by_strides(node: fx.Node) -> bool:
    """Whether what it computes, or whether it can, depends on strides. A view's method that gives another shape is a reshape by now."""
    if called_name(node) == "view":
        return node.op == "call_function" or any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
    if called_name(node) == "max_pool3d" or isinstance(module_of(node), nn.MaxPool3d):
        return any(order is not None and len(order) == 4 for order in provenance(node).formats)  # it takes these for volumes
    return called_name(node) in _OF_STRIDES


def _draws(node: fx.Node) -> bool:
    """Whether it draws random numbers for the elements of a tensor."""
    return isinstance(module_of(node), _RANDOM_MODULES) if node.op == "call_module" else called_name(node) in _RANDOM


def _is_eagers(source: fx.Node, shared: bool) -> bool:
    """Whether this tensor needs no node of ours in front of its reader: the reader shares memory with it, or nothing has changed it."""
    known = source.op in ("placeholder", "get_attr") or source.target in (eager_format, returned)
    return known or (shared and provenance(source).changed_by is not None)


def restore(match: Border) -> None:
    """Put a node in front of each tensor that is read."""
    for source, order in match.sources.items():
        with match.node.graph.inserting_before(match.node):
            restored = match.node.graph.call_function(eager_format, (source, order))
        match.node.replace_input_with(source, restored)


RESTORE_FORMATS = Pass("restore-formats", (Rule(border, restore),))
