"""A few words of SVG. The colours read on a light and on a dark page: nothing has a background, and text is of a middle grey."""

from __future__ import annotations

from html import escape

__all__ = ["BLUE", "FAINT", "GREEN", "ORANGE", "TEXT", "arrow", "box", "label", "line", "picture"]

#: 4.5 to 1 against white, 4.2 to 1 against GitHub's dark page.
TEXT = "#747b83"
FAINT = "#8b949e"
BLUE, ORANGE, GREEN = "#3d7fd1", "#c8761f", "#2f8f6b"

_FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """The whole file. ``title`` is what a screen reader says."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' font-family="{_FONT}">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        f'<path d="M0 0 8 4 0 8z" fill="{TEXT}"/></marker></defs>',
        *parts,
        "</svg>",
        "",
    ])  # fmt: skip


def label(x: float, y: float, words: str, *, size: float = 13, anchor: str = "start", bold: bool = False, colour: str = TEXT) -> str:
    """Text whose baseline is at y."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, *, fill: str = "none", opacity: float = 1.0, stroke: str = "none") -> str:
    """A rectangle with rounded corners."""
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
    return f'<rect {size} fill="{fill}" fill-opacity="{opacity:g}" stroke="{stroke}" stroke-width="1.3"/>'


def line(x0: float, y0: float, x1: float, y1: float, *, colour: str = FAINT, dashed: bool = False, width: float = 1.0) -> str:
    """A straight line."""
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path d="M{x0:g} {y0:g}L{x1:g} {y1:g}" stroke="{colour}" stroke-width="{width:g}" fill="none"{dash}/>'


def arrow(x0: float, y0: float, x1: float, y1: float, *, width: float = 1.5) -> str:
    """A straight line with a tip at (x1, y1)."""
    return f'<path d="M{x0:g} {y0:g}L{x1:g} {y1:g}" stroke="{TEXT}" stroke-width="{width:g}" fill="none" marker-end="url(#tip)"/>'
