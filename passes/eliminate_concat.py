"""eliminate-concat: producers write their channel slice of one buffer; the gradient accumulates in place the same way (ICF)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import OUTPUTS, is_fused, outputs_of, produced_by, set_kwargs
from bnrestructure.passes.base import Fuel, PassResult, erase_dead, finish
from bnrestructure.passes.thread_forks import thread
from bnrestructure.patterns.concat import BranchConcat, GrowingConcat, find_branch_concats, find_growing_concats
from bnrestructure.patterns.fork import Fork, fork_at, readers_of

__all__ = ["EliminateConcat"]


@dataclass(frozen=True)
class EliminateConcat:
    """``cat([a, conv1(..), conv2(..)])`` -> convolutions that write into one preallocated buffer, one after the other.

    A dense block's growing concats all become prefixes of the same buffer. Each prefix has two readers, the next layer and
    the next writer, and is threaded through them: its gradient is one tensor, added to in place.
    """

    name: ClassVar[str] = "eliminate-concat"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        graph, count = graph_module.graph, 0
        # One at a time: a rewrite may replace a tensor, or the concat, that is a segment of the next.
        while (growing := next(iter(find_growing_concats(graph_module)), None)) is not None and self.fuel.take():
            _grow(graph, growing)
            count += 1
        while (branches := _first_branches(graph_module)) is not None and self.fuel.take():
            _branch(graph, branches)
            count += 1
        return finish(graph_module, count)


def _first_branches(gm: fx.GraphModule) -> BranchConcat | None:
    return next((match for match in find_branch_concats(gm) if isinstance(match, BranchConcat)), None)


def _grow(graph: fx.Graph, match: GrowingConcat) -> None:
    convs = [conv for tensor in match.appended if (conv := produced_by(tensor, ops.conv, "y")) is not None]
    first = _first(graph, [*convs, *match.concats])
    with graph.inserting_before(first):
        buffer = graph.call_function(ops.concat_buffer, (match.base,), {"extra": match.extra_channels})
    buffer.meta["nn_module_stack"] = match.concats[0].meta.get("nn_module_stack", {})
    prefixes = [buffer, *match.appended]
    for conv, before in zip(convs, prefixes, strict=False):
        set_kwargs(conv, into=before, offset=None)
    for concat, length in zip(match.concats, match.lengths, strict=True):
        concat.replace_all_uses_with(prefixes[length])
        graph.erase_node(concat)
    _thread_if_fork(graph, match.base)
    for prefix in prefixes:
        fork = readers_of(prefix)
        if len(fork.links) == 1 and not fork.others and fork.last is None:
            continue  # its gradient is that one reader's own dx
        if not _is_only_read_by_a_sweep(fork):
            thread(graph, fork, own=True)


def _is_only_read_by_a_sweep(fork: Fork) -> bool:
    """A fused sweep hands back a gradient of its own, too."""
    only = fork.others[0] if len(fork.others) == 1 and not fork.links and fork.last is None else None
    return is_fused(only, ops.squeeze)


def _thread_if_fork(graph: fx.Graph, tensor: fx.Node) -> None:
    fork = fork_at(tensor)
    if fork is not None:
        thread(graph, fork)


def _branch(graph: fx.Graph, match: BranchConcat) -> None:
    buffer: fx.Node | None = None
    for tensor, offset in match.written:
        place = {"channels": match.channels} if buffer is None else {"into": buffer}
        set_kwargs(tensor.args[0], offset=offset, visible=match.channels, **place)  # type: ignore[arg-type]  # its convolution
        buffer = tensor
    assert buffer is not None
    sources = [_without_own_gradient(tensor) for tensor, _ in match.copied]
    for tensor, (_, offset) in zip(sources, match.copied, strict=True):
        # Behind the readers of the tensor that can pass it on: what the copy hands back is the first part of its gradient.
        links = [link for link in readers_of(tensor).links if link < match.concat]
        outputs = [output for link in links for output in outputs_of(link).values()]
        after = _last(graph, [_last_output(tensor), _last_output(buffer), *outputs])
        with graph.inserting_after(after):
            buffer = graph.call_function(ops.concat_buffer, (tensor,), {"offset": offset, "into": buffer})
        buffer.meta["nn_module_stack"] = match.concat.meta.get("nn_module_stack", {})
    match.concat.replace_all_uses_with(buffer)
    erase_dead(graph, *(tensor for tensor, _ in match.copied if is_fused(tensor, ops.own_gradient)), match.concat)
    for tensor in [*sources, buffer]:
        _thread_if_fork(graph, tensor)


def _without_own_gradient(tensor: fx.Node) -> fx.Node:
    """What a copied segment is a copy of: the copy hands back a gradient in memory of its own, and needs no node in front for that."""
    alone = is_fused(tensor, ops.own_gradient) and len(tensor.users) == 1
    return tensor.args[0] if alone else tensor  # type: ignore[return-value]


def _first(graph: fx.Graph, nodes: list[fx.Node | None]) -> fx.Node:
    wanted = set(nodes)
    return next(node for node in graph.nodes if node in wanted)


def _last(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    wanted = set(nodes)
    return next(node for node in reversed(graph.nodes) if node in wanted)


def _last_output(tensor: fx.Node) -> fx.Node:
    """The last of the getitem nodes that stand together with ``tensor``: the place to insert behind it."""
    source = tensor.args[0] if tensor.args else None
    if tensor.target is not operator.getitem or not is_fused(source) or source.target not in OUTPUTS:  # type: ignore[union-attr]
        return tensor
    return _last(tensor.graph, [*outputs_of(source).values()])  # type: ignore[arg-type]
