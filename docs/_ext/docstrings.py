"""This project's docstrings are plain text with tables of names; autodoc wants reStructuredText. This makes one of the other.

A row of a table is ``name    what it is``, and what follows is indented. ``code`` and :func:`roles` stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["setup", "to_rst"]

_ROW = re.compile(r"^(?P<indent> *)(?P<names>[\w`.*\"=\[\](), /-]+?) {2,}(?P<text>\S.*)$")
_MARKED = re.compile(r"(``.+?``|:\w+:`.+?`|`.+?`_?)")


def to_rst(lines: list[str]) -> list[str]:
    """The docstring's lines with its tables as definition lists, and nothing taken for markup that is none."""
    return list(_converted(lines))


def _converted(lines: list[str]) -> Iterator[str]:
    table: int | None = None  # how far a table's names are indented
    literal = False  # within the block behind a line that ends in ::
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal and (not line.strip() or indent > 0):
            yield line
            continue
        literal = False
        row = _ROW.match(line)
        if table is not None and line.strip() and indent > table:
            yield "    " + _escaped(line.strip())
            continue
        if row is not None and not row["names"].rstrip().endswith((".", ",", ":")):
            if table is None and number and lines[number - 1].strip():
                yield ""
            table = indent
            yield f"``{row['names'].strip().replace('`', '')}``"
            yield "    " + _escaped(row["text"])
            continue
        if table is not None and line.strip():
            yield ""
        table = None if line.strip() else table
        literal = line.rstrip().endswith("::")
        yield _escaped(line)


def _escaped(text: str) -> str:
    """Stars, bars and trailing underscores as themselves, but in what is marked as code or a role."""
    parts = _MARKED.split(text)
    return "".join(part if i % 2 else re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", part) for i, part in enumerate(parts))


def setup(app: Any) -> dict[str, bool]:
    def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        lines[:] = to_rst(lines)

    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
