"""The page that ``bnrestructure show`` prints: a heading, the graph of each region, and what stayed as it was."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bnrestructure.plan.plan import Plan
from bnrestructure.report.graph_text import graph_text
from bnrestructure.report.graph_view import Entry, RegionView
from bnrestructure.report.plan_table import STATUS_STYLE

__all__ = ["AS_CAPTURED", "page", "print_page"]

#: The stage of a graph that no pass has seen: there, nothing is refused yet.
AS_CAPTURED = "as captured"


def page(title: str, stage: str, plan: Plan, views: Sequence[RegionView], *, backward: bool) -> Text:
    """The whole page as text with styles."""
    counts = plan.counts
    text = Text()
    text.append(title, "bold").append(f": training {'backward' if backward else 'forward'}, {stage}; ")
    text.append(f"{len(plan.sites)} batch norms")
    for i, (status, count) in enumerate(counts.items() if stage != AS_CAPTURED else ()):
        text.append(", " if i else ": ").append(f"{count} {status}", STATUS_STYLE[status])
    text.append("\n")
    for view in views:
        text.append("\n")
        if len(views) > 1 or view.path:
            text.append(f"region {view.path or 'the whole model'}\n", "bold underline")
        text.append_text(graph_text(view, backward=backward))
    shown = {f"{view.path}.{s}" if view.path else s for view in views for e in view.entries for s in _sites_of(e)}
    outside = [site for site in plan.sites if site.status == "kept" and site.name not in shown and stage != AS_CAPTURED]
    if outside:
        text.append("\nleft as they were, outside the graphs above\n", "bold")
        for site in outside:
            text.append(f"  {site.name}  ! kept: {site.reason}\n", STATUS_STYLE["kept"])
    return text


def _sites_of(entry: Entry) -> list[str]:
    """The sites whose status the entry shows."""
    if entry.status is None:
        return []
    return [entry.module] if entry.kind == "bn" else [*entry.prologue_sites, *entry.epilogue_sites]


def print_page(
    console: Console, title: str, stage: str, plan: Plan, views: Sequence[RegionView], *, backward: bool
) -> None:
    """Print the page; lines longer than the terminal are cut there, not folded, unless the output is not a terminal."""
    text = page(title, stage, plan, views, backward=backward)
    if console.is_terminal:
        console.print(text, no_wrap=True, overflow="ellipsis", crop=True, end="")
    else:
        print(text.plain, end="")
