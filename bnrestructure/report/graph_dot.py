"""A graph in Graphviz's dot language: modules as clusters, the halves of each batch norm as bands of boxes."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from bnrestructure.report.graph_view import Entry, RegionView

__all__ = ["graph_dot"]

_FILL = {"kept": "#f8c9c4", "partial": "#fdeebb"}
_PROLOGUE, _EPILOGUE, _PLAIN = "#fbe3c0", "#cfe6f5", "#ffffff"


def graph_dot(title: str, views: Sequence[RegionView], *, backward: bool = False) -> str:
    """The dot source of the regions; edges point the way the data flow, forward or backward."""
    lines = [
        f"digraph {_quoted(title)} {{",
        f"  label={_quoted(title)}; labelloc=t; fontname=Helvetica; rankdir=TB; nodesep=0.3; ranksep=0.35;",
        '  node [shape=plain, fontname=Helvetica, fontsize=10]; edge [arrowsize=0.6, color="#555555"];',
    ]
    for index, view in enumerate(views):
        lines += _region(view, f"r{index}_", backward)
    return "\n".join([*lines, "}"])


def _region(view: RegionView, prefix: str, backward: bool) -> Iterator[str]:
    tree: dict[str, list[Entry]] = {}
    for entry in view.entries:
        tree.setdefault(entry.group, []).append(entry)
    groups = {""} | {".".join(g.split(".")[: i + 1]) for g in tree for i in range(len(g.split("."))) if g}
    yield from _cluster("", groups, tree, prefix, backward, "  ")
    known = {entry.id for entry in view.entries}
    for entry in view.entries:
        for source in entry.inputs:
            if source in known:
                a, b = (entry.id, source) if backward else (source, entry.id)
                style = " [style=dashed]" if source == entry.shortcut else ""
                yield f"  {_quoted(prefix + a)} -> {_quoted(prefix + b)}{style};"


def _cluster(
    group: str, groups: set[str], tree: dict[str, list[Entry]], prefix: str, backward: bool, indent: str
) -> Iterator[str]:
    inner = indent
    if group:
        yield f"{indent}subgraph {_quoted('cluster_' + prefix + group)} {{"
        inner = indent + "  "
        yield f"{inner}label={_quoted(group.rpartition('.')[2])}; labeljust=l; fontsize=10;"
        yield f'{inner}color="#aaaaaa"; style=rounded;'
    for entry in tree.get(group, []):
        yield f"{inner}{_quoted(prefix + entry.id)} [label=<{_label(entry, backward)}>];"
    children = sorted(g for g in groups if g and g.rpartition(".")[0] == group)
    for child in children:
        yield from _cluster(child, groups, tree, prefix, backward, inner)
    if group:
        yield f"{indent}}}"


def _label(entry: Entry, backward: bool) -> str:
    """An HTML table: prologue band, name and work, epilogue band, reason."""
    work = entry.backward["work"] if backward else entry.what
    prologue = entry.backward["prologue"] if backward else entry.prologue
    epilogue = entry.backward["epilogue"] if backward else entry.epilogue
    fill = _FILL.get(entry.status or "", _PLAIN)
    rows = [] if prologue is None else [_row(prologue, _PROLOGUE)]
    rows.append(f'<tr><td bgcolor="{fill}"><b>{_text(entry.name)}</b><br/>{_text(work)}</td></tr>')
    rows += [] if epilogue is None else [_row(epilogue, _EPILOGUE)]
    rows += [] if entry.reason is None else [_row(f"{entry.status}: {entry.reason}", _FILL[entry.status or "kept"])]
    return f'<table border="0" cellborder="1" cellspacing="0" cellpadding="4">{"".join(rows)}</table>'


def _row(words: str, colour: str) -> str:
    return f'<tr><td bgcolor="{colour}"><font point-size="9">{_text(words)}</font></td></tr>'


def _text(words: str | None) -> str:
    return html.escape(words or "", quote=False)


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
