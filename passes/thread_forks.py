"""thread-forks: a tensor with several readers is passed from one to the next, so that its gradient accumulates in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import networkx as nx
from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import is_fused, output, produced_by, set_kwargs
from bnrestructure.graph.order import dependency_graph
from bnrestructure.passes.base import Fuel, PassResult, finish
from bnrestructure.patterns.fork import Fork, find_forks

__all__ = ["ThreadForks", "thread"]


@dataclass(frozen=True)
class ThreadForks:
    """Readers r1, r2, ... of x: r1 reads x and returns it, r2 reads that, and so on.

    Backward runs the other way: the last reader makes the gradient, each earlier one adds to it inside its dgrad epilogue, and no separate
    add sweeps over memory. Readers that are not fused nodes hang on the thread where they stand, behind ``own_gradient``.
    """

    name: ClassVar[str] = "thread-forks"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        count = 0
        for fork in find_forks(graph_module):
            if self.fuel.take():
                thread(graph_module.graph, fork)
                count += 1
        return finish(graph_module, count)


def thread(graph: fx.Graph, fork: Fork, *, own: bool = False) -> None:
    """Thread one fork. ``own``: the tensor's own gradient must arrive in memory that its producer may write to."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    last = fork.last
    others = list(fork.others)
    if last is not None and any(position[last] < position[link] for link in fork.links):
        others, last = [*others, last], None
    chain = [*fork.links, *([] if last is None else [last])]
    if last is not None:
        _keep_gradient_private(graph, fork, last)
    readers = sorted([*chain, *others], key=position.__getitem__)
    current, threaded = fork.tensor, own
    for i, reader in enumerate(readers):
        rest = readers[i:]
        hanging = list(_until_next_link(rest, chain))
        if hanging and reader in others and threaded and not is_fused(current, ops.own_gradient):
            current = _own(graph, current)
        if current is not fork.tensor:
            reader.replace_input_with(fork.tensor, current)
        if reader in chain and reader is not last and i + 1 < len(readers):
            set_kwargs(reader, thread=True)
            current, threaded = output(reader, "x"), True


def _until_next_link(readers: list[fx.Node], chain: list[fx.Node]) -> list[fx.Node]:
    """The readers before the next link: those that would all hang on the same point of the thread."""
    hanging = []
    for reader in readers:
        if reader in chain:
            break
        hanging.append(reader)
    return hanging


def _own(graph: fx.Graph, tensor: fx.Node) -> fx.Node:
    position = tensor
    while position.next.target is tensor.target and position.next.args[:1] == tensor.args[:1] and tensor.args:
        position = position.next  # behind the other outputs of the same node
    with graph.inserting_after(position):
        node = graph.call_function(ops.own_gradient, (tensor,))
    node.meta["nn_module_stack"] = tensor.meta.get("nn_module_stack", {})
    return node


def _keep_gradient_private(graph: fx.Graph, fork: Fork, last: fx.Node) -> None:
    """A join that shares its gradient with the producer of y must not, unless every link's backward comes after that producer's.

    The links write into the gradient; y's producer reads it. It has read it before if the links are its ancestors.
    """
    if not is_fused(last, ops.residual) or last.kwargs["gain"] is None:
        return
    producer = produced_by(last.kwargs["gain"], ops.conv, "gain")
    ancestors = nx.ancestors(dependency_graph(graph), producer)
    in_buffer = produced_by(fork.tensor, ops.conv, "y")
    written_below = is_fused(fork.tensor, ops.concat_buffer) or (
        in_buffer is not None and (in_buffer.kwargs["into"] is not None or in_buffer.kwargs["channels"] is not None)
    )
    if written_below or not all(link in ancestors for link in fork.links):
        set_kwargs(last, gain=None)
