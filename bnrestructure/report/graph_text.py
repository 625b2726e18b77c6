"""A graph as a page of text: one line for each layer, under the modules it belongs to."""

from __future__ import annotations

from rich.text import Text

from bnrestructure.report.graph_view import Entry, RegionView
from bnrestructure.report.names import relative
from bnrestructure.report.plan_table import STATUS_STYLE

__all__ = ["graph_text"]

_PROLOGUE, _EPILOGUE, _QUIET = "yellow", "cyan", "dim"
_INDENT = "  "
_SHOWN_ORIGINS = 3


def graph_text(view: RegionView, *, backward: bool = False) -> Text:
    """The lines of one region. Forward in the order of execution, or backward in the opposite order."""
    entries = [e for e in view.entries if e.kind != "output" or e.inputs]
    entries = entries[::-1] if backward else entries
    by_id = {entry.id: entry for entry in entries}
    rows: list[tuple[int, str, Entry | None, str]] = []
    open_group: list[str] = []
    for i, entry in enumerate(entries):
        parts = entry.group.split(".") if entry.group else []
        shared = _shared(open_group, parts)
        for depth in range(shared, len(parts)):
            rows.append((depth, parts[depth], None, ""))
        open_group = parts
        before = entries[i - 1] if i else None
        rows.append((len(parts), entry.name, entry, "" if backward else _origin(entry, before, by_id)))
    width = max((len(_INDENT) * depth + len(name) for depth, name, _, _ in rows), default=0)
    words = max((len(_work(e, backward)) for _, _, e, _ in rows if e is not None), default=0)
    text = Text()
    for depth, name, shown, origin in rows:
        label = _INDENT * depth + name
        if shown is None:
            text.append(f"{label}\n", "bold")
            continue
        line = Text(label.ljust(width + 2), STATUS_STYLE.get(shown.status or "", ""))
        line.append(_work(shown, backward).ljust(words + 2))
        _append_riders(line, shown, backward)
        if origin:
            line.append(f"| {origin} ", _QUIET)
        if not backward:
            for note in shown.notes:
                line.append(f"| {note} ", _QUIET)
        if shown.status is not None:
            line.append(f"! {shown.status}: {shown.reason}", STATUS_STYLE[shown.status])
        line.rstrip()
        text.append_text(line).append("\n")
    return text


def _work(entry: Entry, backward: bool) -> str:
    return str(entry.backward["work"]) if backward else entry.what


def _append_riders(line: Text, entry: Entry, backward: bool) -> None:
    prologue = entry.backward["prologue"] if backward else entry.prologue
    epilogue = entry.backward["epilogue"] if backward else entry.epilogue
    if prologue is not None:
        line.append("| ", _QUIET).append(f"prologue: {prologue} ", _PROLOGUE)
    if epilogue is not None:
        line.append("| ", _QUIET).append(f"epilogue: {epilogue} ", _EPILOGUE)


def _origin(entry: Entry, before: Entry | None, by_id: dict[str, Entry]) -> str:
    """Where it reads from, unless that is just the line above."""
    if not entry.inputs or (before is not None and entry.inputs == [before.id]):
        return ""
    names = [_named(by_id[i], entry.group) for i in entry.inputs if i in by_id]
    more = len(names) - _SHOWN_ORIGINS
    return f"from {', '.join(names[:_SHOWN_ORIGINS])}{f' +{more}' if more > 0 else ''}"


def _named(source: Entry, group: str) -> str:
    path = f"{source.group}.{source.name}" if source.group else source.name
    return relative(path, group)


def _shared(a: list[str], b: list[str]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared
