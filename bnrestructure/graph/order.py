"""The graph as networkx sees it: for questions about order, ancestry and cycles."""

from __future__ import annotations

import networkx as nx
from torch import fx

__all__ = ["depends_on", "is_size_read", "readers_of"]


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that read this node's tensor, in graph order: not those that ask for its sizes alone, which take no gradient to it."""
    return sorted(user for user in node.users if not is_size_read(user))


def is_size_read(node: fx.Node) -> bool:
    """Whether a node asks for a tensor's sizes alone."""
    return node.op == "call_method" and node.target in ("size", "dim", "numel")


def depends_on(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether ``node`` is computed from ``ancestor``, directly or through others: then its backward comes first."""
    if not ancestor < node:
        return False
    between = nx.DiGraph()
    between.add_nodes_from((ancestor, node))
    current = node
    while current is not ancestor:  # what connects the two stands between them
        between.add_edges_from((source, current) for source in current.all_input_nodes)
        current = current.prev
    return bool(nx.has_path(between, ancestor, node))
