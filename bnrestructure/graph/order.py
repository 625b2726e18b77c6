"""The graph as networkx sees it: for questions about order, ancestry and cycles."""

from __future__ import annotations

import networkx as nx
from torch import fx

__all__ = ["dependency_graph"]


def dependency_graph(graph: fx.Graph) -> nx.DiGraph:
    """A directed graph with an edge from each node to every node that reads it."""
    dependencies = nx.DiGraph()
    for node in graph.nodes:
        dependencies.add_node(node)
        for source in node.all_input_nodes:
            dependencies.add_edge(source, node)
    return dependencies
