"""Memory formats where a region's tensors meet code that is not ours: the user's modules and callers see what eager would give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bnrestructure.graph.boundaries import is_library_leaf
from bnrestructure.graph.fused import is_fused

__all__ = ["note_formats", "restore_formats"]

#: The order of a tensor's dimensions in memory, outermost first.
Format = tuple[int, ...]


def note_formats(gm: fx.GraphModule) -> None:
    """Every node of a captured graph remembers the formats of the tensors that it reads, in the order of its arguments."""
    for node in gm.graph.nodes:
        node.meta["bnr_formats"] = [_format_of(source) for source in _sources(node)]


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    return (a for a in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(a, fx.Node))


def _format_of(source: fx.Node) -> Format | None:
    """Of the tensor that a node makes, as far as capture or Dynamo know; None of what is no strided tensor."""
    known = source.meta.get("tensor_meta", source.meta.get("example_value"))
    if known is None or not hasattr(known, "shape"):
        return None
    stride = known.stride if isinstance(known.stride, tuple) else known.stride() if known.layout is torch.strided else ()
    return _order([_number(n) for n in known.shape], [_number(n) for n in stride]) if stride else None


def _number(n: Any) -> int:
    """A size, or under torch.compile the one that a symbol was met with."""
    return int(n.node.hint) if isinstance(n, torch.SymInt) else int(n)


def _order(shape: list[int], stride: list[int]) -> Format:
    """Dimensions by stride; one of size 1 has none that means anything, and stands before the one that follows it in the shape."""
    strides = list(stride)
    for d in reversed(range(len(shape))):
        if shape[d] == 1 and d + 1 < len(shape):
            strides[d] = max(strides[d], strides[d + 1])
    return tuple(sorted(range(len(shape)), key=lambda d: (-strides[d], d)))


def eager_format(x: object, order: Format) -> object:
    """``x`` with its dimensions in this order in memory; itself where they are, or where it is not such a tensor."""
    if not isinstance(x, Tensor) or x.dim() != len(order) or x.layout is not torch.strided:
        return x
    permuted = x.permute(order)
    if permuted.is_contiguous():
        return x
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return permuted.contiguous().permute(inverse)


#: Elementwise random numbers are drawn in memory order: in another layout the same seed would give another mask.
_RANDOM_FUNCTIONS = {
    torch.dropout, torch.dropout_, torch.alpha_dropout, torch.bernoulli, torch.rand_like, torch.randn_like, torch.rrelu,
    torch.empty_like, nn.functional.dropout, nn.functional.alpha_dropout, nn.functional.rrelu, nn.functional.gumbel_softmax,
}  # fmt: skip
_RANDOM_METHODS = {"bernoulli", "bernoulli_", "normal_", "uniform_", "random_", "exponential_", "geometric_", "log_normal_", "cauchy_"}
_RANDOM_MODULES = (nn.Dropout, nn.AlphaDropout, nn.RReLU)


def _draws_random_numbers(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _RANDOM_MODULES)
    return node.target in (_RANDOM_FUNCTIONS if node.op == "call_function" else _RANDOM_METHODS)


def restore_formats(gm: fx.GraphModule) -> None:
    """Put :func:`eager_format` before every opaque call, random draw, write in place and the output, if the graph has fused nodes.

    Fused kernels answer in channels_last whatever the input's layout; a ``.view()`` in the user's own code would not bear that, nor would
    a write through ``y.flatten(1)``, which is a view of y in one layout and a copy in another.
    """
    if not any(is_fused(node) for node in gm.graph.nodes):
        return
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in list(gm.graph.nodes):
        opaque = node.op == "call_module" and not is_library_leaf(modules[str(node.target)])
        shared = "bnr_shared" in node.meta
        if not (node.op == "output" or opaque or shared or _draws_random_numbers(node, modules)):
            continue
        formats = node.meta.get("bnr_formats", [])
        for source, wanted in dict(zip(_sources(node), formats, strict=False)).items():
            if wanted is None or source.op in ("placeholder", "get_attr") or (shared and "bnr_shared" in source.meta):
                continue
            with gm.graph.inserting_before(node):
                restored = gm.graph.call_function(eager_format, (source, wanted))
            node.replace_input_with(source, restored)
    gm.recompile()
