"""A region's graph as a piece of SVG for a page: boxes that say which original layers they stand for, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

import torch

from bnrestructure.plan.plan import Site
from bnrestructure.report.graph_layout import Layout, Placed, lanes_of, lay_out
from bnrestructure.report.graph_view import Entry, RegionView

__all__ = ["Facts", "Pane", "Shapes", "draw_pane", "size_words"]

#: (shape, dtype) of tensors, by what they belong to.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

_CHARACTER, _LINE, _PAD = 6.2, 15.0, 9.0
_LANE = 9.0
#: Sites that a box tells of: a concat's statistics may serve dozens.
_TOLD = 3


@dataclass(frozen=True)
class Facts:
    """What is known of a region beside its graph: shapes by node and by layer of the original, plans by site."""

    shapes: Shapes
    layers: Shapes
    sites: dict[str, Site]

    def shape_of(self, entry: Entry) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Of the tensor that an entry makes."""
        return self.shapes.get(entry.id) or self.layers.get(entry.module)


@dataclass(frozen=True)
class Pane:
    """SVG elements (boxes and edges) with the size of the whole in pixels."""

    elements: str
    width: float
    height: float


def draw_pane(views: Sequence[RegionView], facts: dict[str, Facts]) -> Pane:
    """The regions one below the other. ``facts`` is by the region's path."""
    parts: list[str] = []
    width, y = 0.0, 0.0
    for view in views:
        known = facts[view.path]
        layout = lay_out(view, {entry.id: _size(entry, known) for entry in view.entries}, gap_x=20, gap_y=22)
        lanes = lanes_of(layout)
        if view.path:
            y += 24
            parts.append(f'<text class="region" x="0" y="{y - 8:.0f}">{escape(view.path)}</text>')
        parts.append(f'<g transform="translate(0 {y:.0f})">')
        parts += _edges(layout, lanes)
        parts += [line for box in layout.boxes.values() for line in _box(box, known)]
        parts.append("</g>")
        width = max(width, layout.width + _LANE * (max(lanes.values(), default=-2) + 2))
        y += layout.height + 24
    return Pane("\n".join(parts), width, max(y - 24, 0.0))


def size_words(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """``16x64x56x56, 12.8 MB``."""
    size = math.prod(shape) * dtype.itemsize
    return f"{'x'.join(map(str, shape))}, {size / 1e6:.1f} MB" if size >= 1e5 else f"{'x'.join(map(str, shape))}, {size / 1e3:.1f} kB"


def _path(entry: Entry) -> str:
    return f"{entry.group}.{entry.name}" if entry.group else entry.name


def _rows(entry: Entry, facts: Facts) -> list[tuple[str, list[str]]]:
    """(style, lines) from top to bottom."""
    shape = facts.shape_of(entry)
    body = [_path(entry), *([entry.what] if entry.what else []), *([size_words(*shape)] if shape else [])]
    rows = [("prologue", [entry.prologue])] if entry.prologue else []
    rows.append((_body_style(entry), body))
    rows += [("epilogue", [entry.epilogue])] if entry.epilogue else []
    rows += [(entry.status, [_cut(f"{entry.status}: {entry.reason}")])] if entry.status else []
    return rows


def _body_style(entry: Entry) -> str:
    """Batch norms and activations before any pass are coloured: they are what moves."""
    return {"bn": "body bn", "act": "body act"}.get(entry.kind, "body")


def _cut(words: str, limit: int = 44) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"


def _size(entry: Entry, facts: Facts) -> tuple[float, float]:
    rows = _rows(entry, facts)
    longest = max(len(line) for _, lines in rows for line in lines)
    return longest * _CHARACTER + 2 * _PAD, sum(_height(lines) for _, lines in rows)


def _height(lines: Sequence[str]) -> float:
    return len(lines) * _LINE + 5


def _box(box: Placed, facts: Facts) -> Iterator[str]:
    left, y = box.x - box.width / 2, box.y
    keys = " ".join(_keys(box.entry))
    tip = "\n".join(_tip(box.entry, facts))
    # an attribute's line breaks would be read as spaces
    yield f'<g class="node" tabindex="0" data-keys={quoteattr(keys)} data-tip={quoteattr(tip, {chr(10): "&#10;"})}>'
    for style, lines in _rows(box.entry, facts):
        height = _height(lines)
        yield f'<rect class="{style}" x="{left:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{height:.1f}" rx="3"/>'
        for i, line in enumerate(lines):
            kind = ("name" if i == 0 else "what") if style.startswith("body") else "band"
            yield f'<text class="{kind}" x="{box.x:.1f}" y="{y + 14 + i * _LINE:.1f}" text-anchor="middle">{escape(line)}</text>'
        y += height
    yield "</g>"


def _keys(entry: Entry) -> list[str]:
    """What a box has in common with its counterparts in the other graph: the node, its layer, the sites riding on it."""
    return [f"#{entry.id}", *([entry.module] if entry.module else []), *entry.prologue_sites, *entry.epilogue_sites]


def _tip(entry: Entry, facts: Facts) -> Iterator[str]:
    """Lines for whoever points at the box."""
    yield _path(entry)
    if entry.what:
        yield entry.what
    if (shape := facts.shape_of(entry)) is not None:
        yield f"makes {size_words(*shape)}, {str(shape[1]).removeprefix('torch.')}"
    if entry.prologue:
        yield f"as its input is read: {entry.prologue}"
    if entry.epilogue:
        yield f"of its result: {entry.epilogue}"
    yield from entry.notes
    if any(entry.backward.values()):
        yield "backward: " + "; ".join(words for words in entry.backward.values() if words)
    own = [entry.module] if entry.kind == "bn" else [*entry.prologue_sites, *entry.epilogue_sites]
    sites = [facts.sites[name] for name in dict.fromkeys(own) if name in facts.sites]
    for site in sites[:_TOLD]:
        yield from _site_lines(site)
    if len(sites) > _TOLD:
        yield f"and {len(sites) - _TOLD} sites more"


def _site_lines(site: Site) -> Iterator[str]:
    moved = f"{site.sweeps_before} sweeps, after restructuring {site.sweeps_after}"
    if site.bytes_before is not None and site.bytes_after is not None:
        moved += f" ({site.bytes_before / 1e6:.1f} MB, {site.bytes_after / 1e6:.1f} MB)"
    yield f"site {site.name}: {site.status}, {moved}"
    if site.reason:
        yield f"why: {site.reason}"


def _edges(layout: Layout, lanes: dict[tuple[str, str], int]) -> Iterator[str]:
    for edge in layout.edges:
        source, target = (layout.boxes[name] for name in edge)
        if edge in lanes:
            x = layout.width + _LANE * (lanes[edge] + 1)
            x0, y0 = source.x + source.width / 2, source.y + source.height / 2
            x1, y1 = target.x + target.width / 2, target.y + target.height / 2
            path = f"M{x0:.1f} {y0:.1f}H{x - 5:.1f}q5 0 5 5V{y1 - 5:.1f}q0 5 -5 5H{x1 + 3:.1f}"
            yield f'<path class="edge long" d="{path}" marker-end="url(#tip)"/>'
        else:
            y0, y1 = source.y + source.height, target.y - 3
            half = (y0 + y1) / 2
            path = f"M{source.x:.1f} {y0:.1f}C{source.x:.1f} {half:.1f} {target.x:.1f} {half:.1f} {target.x:.1f} {y1:.1f}"
            yield f'<path class="edge" d="{path}" marker-end="url(#tip)"/>'
