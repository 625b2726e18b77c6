"""Where the command line's words go: results to stdout, progress to stderr and only where somebody watches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Steps", "print_json", "progress", "stdout"]


def stdout() -> Console:
    """A console for results. Piped into a file it is wide: no table is cut to 80 columns there."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200, soft_wrap=False)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=1))


class Steps:
    """How far a piece of work is: call it with a few words as each step begins. ``expect`` says how many are still to come, once known."""

    def __init__(self, title: str, bar: Progress | None = None) -> None:
        self._bar = bar
        self._begun, self._total = 0, 0
        self._task = None if bar is None else bar.add_task(title, total=None, words="")

    def __call__(self, words: str) -> None:
        self._begun += 1
        self._total = max(self._total, self._begun)
        self._show(words=words)

    def expect(self, more: int) -> None:
        """``more`` steps will follow those that have begun."""
        self._total = self._begun + more
        self._show()

    def _show(self, **fields: Any) -> None:
        if self._bar is not None and self._task is not None:
            done = max(0, self._begun - 1)  # the step that has begun is not done yet
            self._bar.update(self._task, completed=done, total=self._total or None, **fields)


@contextmanager
def progress(title: str) -> Iterator[Steps]:
    """A bar on stderr with what is going on, the steps done and those to come; silent unless stderr is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Steps(title)
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[words]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        yield Steps(title, bar)
