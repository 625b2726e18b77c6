"""The table of a verification."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnrestructure.verification.report import VerificationReport

__all__ = ["print_report"]

_SHOWN_FAILURES = 10


def print_report(console: Console, report: VerificationReport) -> None:
    """The worst tensor of each stage and kind, the failures, and the verdict."""
    table = Table(title="worst tensor of each kind", title_justify="left", pad_edge=False)
    for heading in ("stage", "step", "what", "tensor"):
        table.add_column(heading, overflow="fold")
    for heading in ("error", "eager's own", "limit"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for c in report.summary():
        own = "" if c.eager_error is None else f"{c.eager_error:.1e}"
        step = str(c.step) if c.step else ""
        verdict = "[green]ok[/]" if c.ok else "[red]WRONG[/]"
        table.add_row(c.stage, step, c.kind, escape(c.name), f"{c.error:.1e}", own, f"{c.limit:.1e}", verdict)
    console.print(table)
    failures = report.failures
    for c in failures[:_SHOWN_FAILURES]:
        console.print(f"  [red]{escape(str(c))}[/]")
    if len(failures) > _SHOWN_FAILURES:
        console.print(f"  [red]and {len(failures) - _SHOWN_FAILURES} more[/]")
    sites = ", ".join(f"{count} {status}" for status, count in report.sites.items())
    verdict = "[green]equivalent[/]" if report.ok else "[red]NOT equivalent[/]"
    console.print(
        f"[bold]{escape(report.model)}[/]: {verdict}; {len(report.comparisons)} tensors compared; batch norms: {sites}"
    )
    if not report.ok and report.worst is not None:
        console.print(f"  worst: {escape(str(report.worst))}")
    for note in report.notes:
        console.print(f"  [dim]{escape(note)}[/]")
