"""A graph as an SVG picture, drawn here so that no other program is needed.

Each box is one layer; a band on its upper edge is what is applied as the input is read (prologue), a band on its lower
edge what is computed of the result on the way out (epilogue): the two halves of the batch norms, where they now ride.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from bnrestructure.report.graph_layout import Layout, Placed, lanes_of, lay_out
from bnrestructure.report.graph_view import Entry, RegionView

__all__ = ["graph_svg"]

_CHARACTER, _LINE, _PAD = 6.3, 15.0, 8.0
_MARGIN, _LANE = 24.0, 9.0
_LEGEND = (("prologue", "applied as the input is read"), ("epilogue", "computed of the result on the way out"),
           ("partial", "one half takes a sweep"), ("kept", "left as it was"))  # fmt: skip
_STYLE = """
  text { font: 11px Helvetica, Arial, sans-serif; fill: #222 }
  .name { font-weight: bold } .what { fill: #555 } .title { font-size: 16px; font-weight: bold }
  .box { fill: #fff; stroke: #555 } .prologue { fill: #fbe3c0; stroke: #b98a3c } .epilogue { fill: #cfe6f5; stroke:
  #4a88b0 } .partial { fill: #fdeebb; stroke: #b39b2e } .kept { fill: #f8c9c4; stroke: #b3473a }
  .edge { fill: none; stroke: #777; stroke-width: 1.2 } .long { stroke: #6a51a3; stroke-dasharray: 5 3 }
"""


def graph_svg(title: str, views: Sequence[RegionView], *, backward: bool = False) -> str:
    """The picture of the regions, one below the other; backward it is read from the top, too."""
    parts: list[str] = []
    y, width = 70.0, 900.0
    for view in views:
        sizes = {entry.id: _size(entry, backward) for entry in view.entries}
        layout = lay_out(view, sizes, upside_down=backward)
        lanes = lanes_of(layout)
        total = layout.width + 2 * _MARGIN + _LANE * (max(lanes.values(), default=0) + 2)
        if view.path:
            parts.append(f'<text class="title" x="{_MARGIN}" y="{y:.0f}">region {escape(view.path)}</text>')
            y += 20
        parts.append(f'<g transform="translate({_MARGIN} {y:.0f})">')
        parts += _edges(layout, lanes, backward)
        parts += [line for box in layout.boxes.values() for line in _box(box, backward)]
        parts.append("</g>")
        y += layout.height + 50
        width = max(width, total)
    head = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'width="{width:.0f}" height="{y:.0f}" viewBox="0 0 {width:.0f} {y:.0f}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{y:.0f}" fill="#fcfcfc"/>',
        f'<text class="title" x="{_MARGIN}" y="26">{escape(title)}</text>',
    ]
    return "\n".join([*head, *_legend(), *parts, "</svg>"])


def _legend() -> Iterator[str]:
    x = _MARGIN
    for style, words in _LEGEND:
        yield f'<rect class="{style}" x="{x:.0f}" y="38" width="14" height="12" rx="2"/>'
        label = f"{style}: {words}"
        yield f'<text x="{x + 19:.0f}" y="48">{label}</text>'
        x += 40 + len(label) * 6


def _rows(entry: Entry, backward: bool) -> list[tuple[str, str]]:
    """(style, words) from top to bottom."""
    if backward:
        prologue, work, epilogue = (entry.backward[k] for k in ("prologue", "work", "epilogue"))
    else:
        prologue, work, epilogue = entry.prologue, entry.what, entry.epilogue
    rows = [] if prologue is None else [("prologue", prologue)]
    rows.append(("box", work or ""))
    rows += [] if epilogue is None else [("epilogue", epilogue)]
    rows += [] if entry.status is None else [(entry.status, _cut(f"{entry.status}: {entry.reason}"))]
    return rows


def _cut(words: str, limit: int = 70) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"


def _path(entry: Entry) -> str:
    return f"{entry.group}.{entry.name}" if entry.group else entry.name


def _size(entry: Entry, backward: bool) -> tuple[float, float]:
    rows = _rows(entry, backward)
    longest = max(len(words) for _, words in rows)
    longest = max(longest, len(_path(entry)) + 1)
    return longest * _CHARACTER + 2 * _PAD, (len(rows) + 1) * _LINE + 6


def _box(box: Placed, backward: bool) -> Iterator[str]:
    left, y = box.x - box.width / 2, box.y
    yield f"<g><title>{escape(_tooltip(box.entry))}</title>"
    for style, words in _rows(box.entry, backward):
        height = 2 * _LINE + 6 if style == "box" else _LINE
        yield f'<rect class="{style}" x="{left:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{height:.1f}" rx="2"/>'
        if style == "box":
            name = escape(_path(box.entry))
            yield f'<text class="name" x="{box.x:.1f}" y="{y + 14:.1f}" text-anchor="middle">{name}</text>'
            yield f'<text class="what" x="{box.x:.1f}" y="{y + 29:.1f}" text-anchor="middle">{escape(words)}</text>'
        else:
            yield f'<text x="{box.x:.1f}" y="{y + 11:.1f}" text-anchor="middle">{escape(words)}</text>'
        y += height
    yield "</g>"


def _tooltip(entry: Entry) -> str:
    return "\n".join([_path(entry), *entry.notes, *([entry.reason] if entry.reason else [])])


def _edges(layout: Layout, lanes: dict[tuple[str, str], int], backward: bool) -> Iterator[str]:
    for edge in layout.edges:
        source, target = (layout.boxes[name] for name in (edge[::-1] if backward else edge))
        if edge in lanes:
            lane = layout.width + _LANE * (lanes[edge] + 1.5)
            x0, y0 = source.x + source.width / 2, source.y + source.height / 2
            x1, y1 = target.x + target.width / 2, target.y + target.height / 2
            path = f"M{x0:.1f} {y0:.1f}H{lane - 6:.1f}q6 0 6 6V{y1 - 6:.1f}q0 6 -6 6H{x1 + 2:.1f}"
            yield f'<path class="edge long" d="{path}" marker-end="url(#tip)"/>'
            continue
        y0, y1 = source.y + source.height, target.y - 2
        middle = (y0 + y1) / 2
        path = (
            f"M{source.x:.1f} {y0:.1f}C{source.x:.1f} {middle:.1f} {target.x:.1f} {middle:.1f} {target.x:.1f} {y1:.1f}"
        )
        yield f'<path class="edge" d="{path}" marker-end="url(#tip)"/>'
