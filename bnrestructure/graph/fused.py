"""Fused nodes in a graph: their outputs by name, their readers, and making or changing them."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from bnrestructure import ops

__all__ = [
    "OUTPUTS",
    "THREADABLE",
    "is_fused",
    "normalised_tensors",
    "output",
    "outputs_of",
    "produced_by",
    "set_kwargs",
    "tensor_readers",
]

#: The outputs of each fused function, in order, under the names that graphs are printed with.
OUTPUTS: dict[Any, tuple[str, ...]] = {
    ops.conv: ("y", "mean", "var", "size", "x", "gain"),
    ops.statistics: ("mean", "var", "size", "x"),
    ops.finalize: ("scale", "beta"),
    ops.normalise: ("z", "x"),
    ops.max_pool: ("z", "x"),
    ops.avg_pool: ("z", "x"),
    ops.squeeze: ("pooled", "x"),
    ops.residual: ("out", "mean", "var", "size"),
}

#: Fused functions that can pass their input ``x`` through to its next reader. (A convolution with a shortcut ``r`` passes on the sum.)
THREADABLE = {ops.conv, ops.statistics, ops.normalise, ops.max_pool, ops.avg_pool}


def is_fused(node: Any, function: Any = None) -> bool:
    """Whether ``node`` calls a fused function (this one, when given)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return node.target in OUTPUTS or node.target in (ops.concat_buffer, ops.own_gradient) if function is None else (
        node.target is function
    )


def _index(item: fx.Node) -> int:
    return int(item.args[1])  # type: ignore[arg-type]


def outputs_of(node: fx.Node) -> dict[str, fx.Node]:
    """The getitem nodes that exist on a fused node's outputs, by output name."""
    names = OUTPUTS[node.target]
    return {names[_index(u)]: u for u in node.users if u.target is operator.getitem}


def output(node: fx.Node, name: str) -> fx.Node:
    """The getitem node for one output of a fused node, made right behind it if there is none."""
    existing = outputs_of(node).get(name)
    if existing is not None:
        return existing
    graph = node.graph
    position = node
    while position.next.target is operator.getitem and position.next.args[0] is node:
        position = position.next
    with graph.inserting_after(position):
        item = graph.call_function(operator.getitem, (node, OUTPUTS[node.target].index(name)))
    item.name = graph._graph_namespace.create_name(f"{node.name}_{name}", None)
    return item


def produced_by(value: Any, function: Any, name: str) -> fx.Node | None:
    """The fused node of which ``value`` is the named output, or None."""
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return None
    source = value.args[0]
    if is_fused(source, function) and OUTPUTS[function][_index(value)] == name:
        return source  # type: ignore[return-value]
    return None


def set_kwargs(node: fx.Node, **changes: Any) -> None:
    """Replace some keyword arguments of a node."""
    node.kwargs = {**node.kwargs, **changes}


def tensor_readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read this node's tensor, in graph order."""
    users = set(node.users)
    found = []
    current = node.next
    while users and current.op != "root":
        if current in users:
            users.discard(current)
            found.append(current)
        current = current.next
    return found


def normalised_tensors(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """(normalise node, its z) for every normalise node whose result is read, in graph order."""
    pairs = ((produced_by(node, ops.normalise, "z"), node) for node in gm.graph.nodes)
    return [(source, node) for source, node in pairs if source is not None and node.users]
