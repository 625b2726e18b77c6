"""Positions for drawing a graph from top to bottom: a layer for each step of the longest path, branches abreast."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from bnrestructure.report.graph_view import Entry, RegionView

__all__ = ["Layout", "Placed", "lanes_of", "lay_out"]


@dataclass
class Placed:
    """One box; x is its centre and y its top, in pixels."""

    entry: Entry
    layer: int
    x: float
    y: float
    width: float
    height: float


@dataclass
class Layout:
    """Boxes by id, edges (from, to) in forward direction, the size of the whole."""

    boxes: dict[str, Placed]
    edges: list[tuple[str, str]]
    width: float
    height: float


def lay_out(
    view: RegionView,
    sizes: dict[str, tuple[float, float]],
    *,
    gap_x: float = 24,
    gap_y: float = 26,
    upside_down: bool = False,
) -> Layout:
    """Place the entries of a region. ``sizes`` is (width, height) by id; ``upside_down`` puts the output on top."""
    graph = nx.DiGraph()
    by_id = {entry.id: entry for entry in view.entries}
    graph.add_nodes_from(by_id)
    edges = [(source, entry.id) for entry in view.entries for source in entry.inputs if source in by_id]
    graph.add_edges_from(edges)
    layers = _layers(graph)
    if upside_down:
        layers = layers[::-1]
    order = _without_crossings(layers, graph)
    boxes: dict[str, Placed] = {}
    widest = max((sum(sizes[n][0] + gap_x for n in layer) - gap_x for layer in order), default=0.0)
    y = 0.0
    for index, layer in enumerate(order):
        total = sum(sizes[n][0] + gap_x for n in layer) - gap_x
        x = (widest - total) / 2
        tallest = max(sizes[n][1] for n in layer)
        for name in layer:
            width, height = sizes[name]
            boxes[name] = Placed(by_id[name], index, x + width / 2, y + (tallest - height) / 2, width, height)
            x += width + gap_x
        y += tallest + gap_y
    return Layout(boxes, edges, widest, max(y - gap_y, 0.0))


def _layers(graph: nx.DiGraph) -> list[list[str]]:
    """Nodes by their longest distance from an input; a node without readers below sits right under what it reads."""
    return [list(layer) for layer in nx.topological_generations(graph)]


def _without_crossings(layers: list[list[str]], graph: nx.DiGraph) -> list[list[str]]:
    """Each layer sorted by the mean place of its neighbours in the layer above (one barycentre sweep)."""
    place: dict[str, float] = {}
    ordered = []
    for layer in layers:

        def key(name: str) -> float:
            around = [place[n] for n in (*graph.predecessors(name), *graph.successors(name)) if n in place]
            return sum(around) / len(around) if around else 0.0

        keys = {name: key(name) for name in layer}
        layer = sorted(layer, key=keys.__getitem__)
        for i, name in enumerate(layer):
            place[name] = i - (len(layer) - 1) / 2
        ordered.append(layer)
    return ordered


def lanes_of(layout: Layout) -> dict[tuple[str, str], int]:
    """Edges that skip layers run in lanes right of the boxes, one for each that overlaps others: edge -> lane, from the left."""
    spans = []
    for edge in layout.edges:
        a, b = sorted(layout.boxes[name].layer for name in edge)
        if b - a > 1:
            spans.append((a, b, edge))
    lanes: dict[tuple[str, str], int] = {}
    free: list[int] = []  # the layer from which on each lane is free
    for a, b, edge in sorted(spans, key=lambda span: span[:2]):
        lane = next((i for i, until in enumerate(free) if until <= a), len(free))
        free[lane : lane + 1] = [b]
        lanes[edge] = lane
    return lanes
