"""What ``bnrestructure bench`` shows while it works: how long it will take, the jobs done and to come, and the runs of this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bnrestructure.bench.estimate import Estimate
from bnrestructure.bench.run import Listener
from bnrestructure.bench.settings import Settings

__all__ = ["watched"]


@contextmanager
def watched(settings: Settings) -> Iterator[Listener]:
    """A listener for run_benchmark; bars on stderr, if that is a terminal, and nothing otherwise."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[run]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Watcher(settings, progress)


class _Watcher:
    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.jobs = progress.add_task(settings.model, total=None, run="")
        self.runs = progress.add_task("", total=None, run="")
        self.begun = 0

    def __call__(self, title: str) -> Callable[[dict[str, Any]], None]:
        """A job begins; what is returned hears of its runs."""
        self.progress.update(self.jobs, completed=self.begun)
        self.begun += 1
        self.progress.reset(self.runs, total=None, description=title, run="")
        since, runs = time.perf_counter(), 0

        def listen(message: dict[str, Any]) -> None:
            nonlocal runs
            if "step_seconds" in message:
                self.say_how_long(message, time.perf_counter() - since)
            elif "total" in message:
                self.progress.update(self.runs, total=message["total"])
            else:
                self.progress.update(self.runs, completed=runs, run=message["run"])
                runs += 1

        return listen

    def say_how_long(self, message: dict[str, Any], elapsed: float) -> None:
        small, batch = message["step_seconds"], message["batch"]
        # a first step came before the one that was timed
        load = max(0.0, elapsed - 2 * small)
        estimate = Estimate(self.settings, small * self.settings.batch / batch, small, load, message["memory_efficient"])
        self.progress.update(self.jobs, total=estimate.jobs)
        if not self.progress.disable:
            self.progress.console.print(f"{self.settings.model}: {estimate}", highlight=False, soft_wrap=True)
