"""What ``show --check`` prints: the rules of the IR, looked at after each pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import fx

from bnrestructure.graph.verify import RULES, violations
from bnrestructure.passes.pipeline import steps

__all__ = ["Stage", "check_region", "print_checks"]


@dataclass
class Stage:
    """One pass on one region: how many rewrites it made, how many nodes the graph has then, and what is wrong with it."""

    name: str
    rewrites: int
    nodes: int
    violations: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def check_region(gm: fx.GraphModule, names: Sequence[str], backend: str) -> list[Stage]:
    """Run passes on a prepared graph, in place, up to the first that leaves a rule broken."""
    stages: list[Stage] = []
    for step in steps(names, backend):
        count = step.apply(gm.graph)
        found = [f"{node.name} breaks the rule {rule!r}: {what}" for node, rule, what in violations(gm.graph)]
        stages.append(Stage(step.name, count, len(gm.graph.nodes), found))
        if found:
            break
    return stages


def print_checks(console: Console, model: str, stages: Mapping[str, Sequence[Stage]]) -> None:
    """A table of the passes, with one line for each node that breaks a rule, and the verdict."""
    table = Table(title=f"{escape(model)}: {len(RULES)} rules after each pass", title_justify="left", pad_edge=False)
    for heading in ("region", "pass"):
        table.add_column(heading, overflow="fold")
    for heading in ("rewrites", "nodes"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for path, of in stages.items():
        for stage in of:
            verdict = "[red]BROKEN[/]" if stage.violations else "[green]holds[/]"
            table.add_row(escape(path or "the whole model"), stage.name, str(stage.rewrites), str(stage.nodes), verdict)
    console.print(table)
    for of in stages.values():
        for line in (line for stage in of for line in stage.violations):
            console.print(f"  [red]{escape(line)}[/]")
