"""The graph before and after restructuring, side by side on one page of HTML that loads nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources

from torch import fx

from bnrestructure.graph.provenance import known_tensor
from bnrestructure.plan.plan import Plan, Site
from bnrestructure.plan.survey import Survey
from bnrestructure.report.graph_panes import Facts, Pane, Shapes, draw_pane
from bnrestructure.report.graph_view import RegionView, view_region

__all__ = ["compared", "graph_html"]

_TEMPLATE = "graph_compare.html"


def compared(survey: Survey, plan: Plan) -> tuple[Pane, Pane]:
    """The model's training graph before and after the passes; with example inputs the boxes say how large what they make is."""
    sites = {site.name: site for site in plan.sites}
    befores: list[RegionView] = []
    afters: list[RegionView] = []
    facts: dict[str, Facts] = {}
    for region in survey.regions:
        path, before = region.path, region.before
        if before is None:
            continue
        befores.append(view_region(path, before, before, {}))
        afters.append(view_region(path, region.after, before, sites))
        shapes = _shapes(before.graph) if region.given else {}
        layers = {entry.module: shapes[entry.id] for entry in befores[-1].entries if entry.module and entry.id in shapes}
        facts[path] = Facts(shapes, layers, _within(path, sites))
    return draw_pane(befores, facts), draw_pane(afters, facts)


def _shapes(graph: fx.Graph) -> Shapes:
    known = {node.name: known_tensor(node) for node in graph.nodes}
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in known.items() if tensor is not None}


def _within(path: str, sites: dict[str, Site]) -> dict[str, Site]:
    """The sites of a region by the names that they have inside it."""
    prefix = f"{path}." if path else ""
    return {name.removeprefix(prefix): site for name, site in sites.items() if name.startswith(prefix)}


def graph_html(title: str, plan: Plan, panes: tuple[Pane, Pane]) -> str:
    """The page. ``title`` is the model's name."""
    n = plan.counts
    summary = f"{len(plan.sites)} batch norms: {n['fused']} fused, {n['partial']} partial, {n['kept']} kept"
    moved = [(s.bytes_before, s.bytes_after) for s in plan.sites if s.bytes_before is not None and s.bytes_after is not None]
    if moved:
        before, after = (sum(sides) / 1e6 for sides in zip(*moved, strict=True))
        summary += f". Their sweeps through memory in one step: {before:,.0f} MB before, {after:,.0f} MB after"
    filled = {
        "@TITLE@": html.escape(title),
        "@SUMMARY@": html.escape(summary),
        "@PANES@": "\n".join(_section(name, pane) for name, pane in zip(("before", "after"), panes, strict=True)),
    }
    page = (resources.files("bnrestructure.report") / _TEMPLATE).read_text(encoding="utf-8")
    for mark, text in filled.items():
        page = page.replace(mark, text)
    return page


def _section(name: str, pane: Pane) -> str:
    buttons: Sequence[tuple[str, str, str]] = (
        ("-", "-", "smaller"), ("+", "+", "larger"), ("width", "width", "as wide as the pane"), ("all", "all", "all of it"),
    )  # fmt: skip
    shown = "".join(f'<button data-zoom="{key}" title="{title}">{label}</button>' for key, label, title in buttons)
    # half a pixel of a box's line lies outside of it
    box = f"-2 -2 {pane.width + 4:.0f} {pane.height + 4:.0f}"
    return (
        f'<section aria-label="{name}"><div class="bar"><h2>{name}</h2>{shown}</div><div class="view">'
        f'<svg viewBox="{box}" width="{pane.width + 4:.0f}" height="{pane.height + 4:.0f}" role="img">{pane.elements}</svg></div></section>'
    )
