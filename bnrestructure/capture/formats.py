"""Memory formats where a region's tensors meet code that is not ours: the user's modules and callers see what eager would give them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from bnrestructure.core.memory_format import is_channels_last
from bnrestructure.graph.boundaries import is_library_leaf
from bnrestructure.graph.fused import is_fused

__all__ = ["restore_formats"]


def channels_last_dimensions(arguments: tuple[object, ...], weights: tuple[object, ...]) -> frozenset[int]:
    """Of 4 and 5 dimensions, those of the tensors that eager convolutions lay out channels_last.

    They do where an argument or a weight of as many is laid out so; and where anything is, if no argument has as many: frames are made
    of a video. Sizes are arguments as well in the graphs that Dynamo makes.
    """
    last = {t.dim() for t in (*arguments, *weights) if is_channels_last(t)}
    given = {t.dim() for t in arguments if isinstance(t, Tensor)}
    return frozenset(d for d in (4, 5) if d in last or (last and d not in given))


def eager_format(x: object, channels_last: frozenset[int], fused_1d: bool) -> object:
    """``x`` contiguous, unless tensors of its dimensions are channels_last (or x is no tensor). Eager knows no such format of 1-D data."""
    if not isinstance(x, Tensor):
        return x
    kept = x.dim() in channels_last if x.dim() in (4, 5) else channels_last and not (fused_1d and x.dim() == 3)
    return x if kept else x.contiguous()


def _is_1d(node: fx.Node) -> bool:
    """Whether a fused node answers in [N, C, L] or may do so: what a 1-D convolution or a BatchNorm1d became."""
    stride, dimensions = node.kwargs.get("stride"), node.kwargs.get("dimensions")
    return (isinstance(stride, tuple) and len(stride) == 1) or (isinstance(dimensions, tuple) and 3 in dimensions)


#: Elementwise random numbers are drawn in memory order: in another layout the same seed would give another mask.
_RANDOM_FUNCTIONS = {
    torch.dropout, torch.dropout_, torch.alpha_dropout, torch.bernoulli, torch.rand_like, torch.randn_like, torch.rrelu,
    nn.functional.dropout, nn.functional.alpha_dropout, nn.functional.rrelu,
}  # fmt: skip
_RANDOM_MODULES = (nn.Dropout, nn.AlphaDropout, nn.RReLU)


def _draws_random_numbers(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _RANDOM_MODULES)
    return node.op == "call_function" and node.target in _RANDOM_FUNCTIONS


def restore_formats(gm: fx.GraphModule) -> None:
    """Put :func:`eager_format` before every opaque module call, random draw, write in place and the output, if the graph has fused nodes.

    Fused kernels answer in channels_last whatever the input's layout; a ``.view()`` in the user's own code would not bear that, nor would
    a write through ``y.flatten(1)``, which is a view of y in one layout and a copy in another.
    """
    fused = [node for node in gm.graph.nodes if is_fused(node)]
    if not fused:
        return
    fused_1d = any(_is_1d(node) for node in fused)
    modules = dict(gm.named_modules(remove_duplicate=False))
    arguments = tuple(node for node in gm.graph.nodes if node.op == "placeholder")
    read: dict[int, str] = {}  # the first convolution's weight of each number of dimensions
    for node in fused:
        weight, stride = node.kwargs.get("weight"), node.kwargs.get("stride")
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and isinstance(stride, tuple):
            read.setdefault(len(stride), str(weight.target))
    start = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(start):
        weights = tuple(gm.graph.create_node("get_attr", target) for target in read.values())
        flag = gm.graph.call_function(channels_last_dimensions, (arguments, weights))
    for node in list(gm.graph.nodes):
        opaque = node.op == "call_module" and not is_library_leaf(modules[str(node.target)])
        shared = "bnr_shared" in node.meta
        if node.op == "output" or opaque or shared or _draws_random_numbers(node, modules):
            for source in list(node.all_input_nodes):
                if source.op in ("placeholder", "get_attr") or (shared and "bnr_shared" in source.meta):
                    continue
                with gm.graph.inserting_before(node):
                    restored = gm.graph.call_function(eager_format, (source, flag, fused_1d))
                node.replace_input_with(source, restored)
    gm.recompile()


