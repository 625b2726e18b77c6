"""The site table of a plan, and the kernels behind its convolutions."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnrestructure.plan.plan import Kernel, Plan, Site

__all__ = ["STATUS_STYLE", "print_kernels", "print_plan"]

STATUS_STYLE = {"fused": "green", "partial": "yellow", "kept": "red"}


def print_plan(console: Console, plan: Plan, title: str) -> None:
    """One row for each batch norm, totals, the reasons with their counts, coverage."""
    sized = any(site.bytes_before is not None for site in plan.sites)
    table = Table(
        title=f"{escape(title)}: {len(plan.sites)} batch norms",
        title_justify="left",
        show_footer=bool(plan.sites),
        pad_edge=False,
    )
    table.add_column("site", "total", overflow="fold")
    table.add_column("status", _share(plan))
    table.add_column("pattern", overflow="fold")
    table.add_column("shape")
    table.add_column(
        "sweeps",
        _arrow(sum(s.sweeps_before for s in plan.sites), sum(s.sweeps_after for s in plan.sites)),
        justify="right",
    )
    if sized:
        table.add_column("MB", _megabytes(plan.sites), justify="right")
    table.add_column("reason", overflow="fold")
    for site in plan.sites:
        cells = [
            escape(site.name),
            f"[{STATUS_STYLE[site.status]}]{site.status}[/]",
            escape(site.pattern),
            _shape(site),
            _arrow(site.sweeps_before, site.sweeps_after),
        ]
        if sized:
            cells.append(_megabytes([site]))
        table.add_row(*cells, escape(site.reason or ""))
    if plan.sites:
        console.print(table)
    _print_summary(console, plan)


def _print_summary(console: Console, plan: Plan) -> None:
    counts = plan.counts
    parts = [f"[{STATUS_STYLE[status]}]{counts[status]} {status}[/]" for status in counts]
    console.print(
        f"[bold]{escape(plan.model)}[/]: {len(plan.sites)} BN layers, {', '.join(parts)} ({plan.coverage:.0%} fully fused)"
    )
    for reason, count in plan.reasons.items():
        console.print(f"  {count} x {escape(reason)}")
    if plan.kernels:
        chosen = Counter((k.forward, k.backward) for k in plan.kernels).most_common()
        counted = "; ".join(
            f"{count} {forward}" if forward == backward else f"{count} {forward} forward, {backward} backward"
            for (forward, backward), count in chosen
        )
        console.print(f"  kernels of its {len(plan.kernels)} fused convolutions: {escape(counted)}")
    if plan.regions and plan.regions != ["the whole model"]:
        console.print(f"  rewritten regions: {escape(', '.join(plan.regions))}")
    if plan.history is not None:
        console.print(f"  {escape(plan.history)}")
    for note in plan.notes:
        console.print(f"  [dim]{escape(note)}[/]")


def print_kernels(console: Console, kernels: list[Kernel]) -> None:
    """What each fused convolution runs, and why: one row each, two where forward and backward differ."""
    table = Table(title="kernels of the fused convolutions", title_justify="left", pad_edge=False)
    for header in ("convolution", "input", "pass", "kernel", "why"):
        table.add_column(header, overflow="fold")
    for kernel in kernels:
        shape = "x".join(map(str, kernel.shape))
        rows = [("forward", kernel.forward, kernel.forward_reason), ("backward", kernel.backward, kernel.backward_reason)]
        if rows[0][1:] == rows[1][1:]:
            rows = [("both", *rows[0][1:])]
        for i, row in enumerate(rows):
            table.add_row(*(("", "") if i else (escape(kernel.name), shape)), *map(escape, row))
    console.print(table)


def _share(plan: Plan) -> str:
    return f"{plan.coverage:.0%} fused"


def _shape(site: Site) -> str:
    return "" if site.shape is None else f"{'x'.join(map(str, site.shape))} [dim]{site.dtype}[/]"


def _arrow(before: int, after: int) -> str:
    return f"{before} -> {after}"


def _megabytes(sites: list[Site]) -> str:
    known = [(s.bytes_before, s.bytes_after) for s in sites if s.bytes_before is not None and s.bytes_after is not None]
    if not known:
        return ""
    return f"{sum(b for b, _ in known) / 1e6:.1f} -> {sum(a for _, a in known) / 1e6:.1f}"
