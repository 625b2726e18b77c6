"""What ``make demo`` shows in a minute: what restructuring does to a network, that the numbers stay, and what is won on this machine.

Nothing is downloaded: the photos ship with scikit-learn, the networks start from random weights. Times are of this machine as it
is now and are printed whichever way they went; ``bnrestructure bench`` measures with more care.

    python examples/demo.py            everything
    python examples/demo.py --first    the first part alone: plan, graph and check, without timing
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import figures
import torch
import torchvision
from photos import photo_batch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import bnrestructure
from bnrestructure.bench.curves import memory_curve
from bnrestructure.bench.paired import PairedTimings, time_paired
from bnrestructure.bench.workload import TrainingStep
from bnrestructure.capture.regions import Options
from bnrestructure.kernels.cpu import processor
from bnrestructure.passes.pipeline import PASSES
from bnrestructure.plan.survey import take_survey
from bnrestructure.report.graph_text import graph_text
from bnrestructure.report.graph_view import view_region

MODELS = ("densenet121", "resnet50")
BATCH, SIZE = 16, 128
CHECKED_BATCH, CHECKED_SIZE = 4, 64
ROUNDS, WARMUP = 4, 1
#: Columns of the widest line.
WIDTH = 100
BAR = 30

console = Console(highlight=False)
console = console if console.is_terminal and console.width <= WIDTH else Console(highlight=False, width=WIDTH)


@dataclass
class Result:
    """What was measured of one model: seconds of a step, and the most bytes held at once (before, after)."""

    model: str
    timings: PairedTimings
    peak: tuple[int, int]

    @property
    def time(self) -> float:
        """The restructured step's time as a share of eager's."""
        return 1 / self.timings.ratio("eager", "restructured").median

    @property
    def memory(self) -> float:
        """The same of peak memory."""
        return self.peak[1] / self.peak[0]


def main() -> int:
    """Exit status 1 when the numbers of a restructured model are wrong."""
    started = time.perf_counter()
    console.print(f"PyTorch {torch.__version__}, {processor.name()}, {torch.get_num_threads()} threads")
    first = MODELS[0]
    console.rule(f"[bold]what happens to {first}")
    plan_and_graph(first)
    if not check(first):
        return 1
    if "--first" not in sys.argv[1:]:
        console.rule("[bold]what is won on this machine")
        results = [measured(name) for name in MODELS]
        console.print(chart(results))
    console.print(what_next(), soft_wrap=True)
    console.print(f"[dim]{time.perf_counter() - started:.0f} s in all[/]")
    return 0


def build(name: str) -> nn.Module:
    """A freshly initialised torchvision model, the same at each call."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=2).to(memory_format=torch.channels_last)


# --- what it does -----------------------------------------------------------------------------------------------------


def plan_and_graph(name: str) -> None:
    """The plan's first sites and its totals, and the first layers of the graph before and after."""
    model = build(name)
    plan = bnrestructure.explain(model, torch.empty(BATCH, 3, SIZE, SIZE))
    table = Table(title=f"bnrestructure plan {name}", title_justify="left", box=None, pad_edge=False)
    for heading in ("batch norm", "status", "what it stands in", "sweeps a step", "MB moved a step"):
        table.add_column(heading, no_wrap=True, justify="right" if "step" in heading else "left")
    for site in plan.sites[:6]:
        sweeps = f"{site.sweeps_before} → {site.sweeps_after}"
        name_inside = site.name.removeprefix("features.")
        table.add_row(name_inside, site.status, site.pattern, sweeps, _megabytes(site.bytes_before, site.bytes_after))
    moved = [(site.bytes_before or 0, site.bytes_after or 0) for site in plan.sites]
    count = plan.counts
    fused = f"{count['fused']} fused"
    table.add_row(f"... all {len(plan.sites)}", fused, f"{count['partial']} partial", "", _megabytes(*map(sum, zip(*moved, strict=True))))
    console.print(table)
    if plan.reasons:
        console.print(f"partial: {next(iter(plan.reasons))}", no_wrap=True, overflow="ellipsis")
    console.print(f"\n[bold]bnrestructure show {name}[/]: the layers as they run now")
    region = take_survey(model, Options("auto", PASSES)).regions[0]
    view = view_region(region.path, region.after, region.before or region.after, {})
    for line in graph_text(view, backward=False).plain.splitlines()[:12]:
        console.print(line, no_wrap=True, overflow="ellipsis", markup=False)
    console.print("...\n")


def _megabytes(before: int | None, after: int | None) -> str:
    return f"{(before or 0) / 1e6:,.0f} → {(after or 0) / 1e6:,.0f}"


def check(name: str) -> bool:
    """Whether a restructured training step is right, judged against the original in float64, on photos."""
    with console.status(f"{name}: checking against the original in float64, on photos"):
        report = bnrestructure.verify(build(name), photo_batch(CHECKED_BATCH, CHECKED_SIZE)[0], steps=0)
    if not report.ok:
        console.print(f"[red]{report}")
        return False
    compared = len(report.comparisons)
    console.print(f"[bold]bnrestructure verify {name}[/]: equivalent. {compared} tensors of a training step on photos agree")
    console.print("with the original in float64, and in float32 are as near to that as eager PyTorch is.\n")
    return True


# --- what is won ------------------------------------------------------------------------------------------------------


def measured(name: str) -> Result:
    """Time both versions in turns, and record what memory each holds over one step."""
    original = build(name).train()
    restructured = bnrestructure.restructure(copy.deepcopy(original))
    photos, _ = photo_batch(BATCH, SIZE)
    steps = {"eager": TrainingStep(original, (photos,), "cpu"), "restructured": TrainingStep(restructured, (photos,), "cpu")}
    with console.status(f"{name}: {ROUNDS} training steps of each version in turns, batch {BATCH}, {SIZE}x{SIZE}"):
        timings = time_paired(steps, rounds=ROUNDS, warmup=WARMUP)
    with console.status(f"{name}: memory over one step of each version"):
        before, after = (max(size for _, size in memory_curve(step)) for step in steps.values())
    return Result(name, timings, (before, after))


def chart(results: list[Result]) -> Table:
    """The front page's chart, of this machine: ours as a share of eager's."""
    title = f"a training step, batch {BATCH}, {SIZE}x{SIZE}, float32; eager PyTorch (channels_last) = 1"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "time", "", "peak memory", ""):
        table.add_column(heading, no_wrap=True)
    for result in results:
        before, after = (result.timings.spread(version).median * 1e3 for version in ("eager", "restructured"))
        speedup = 1 / result.time
        table.add_row(
            result.model, bar(result.time, "blue"), f"[bold]{speedup:.2f}x[/] {before:.0f} → {after:.0f} ms",
            bar(result.memory, "green"), f"[bold]{result.memory:.2f}x[/] {_megabytes(*result.peak)} MB",
        )  # fmt: skip
    rows = {row.model: row for row in figures.front_rows() if row.dtype == "fp32"}
    careful = "; ".join(f"{r.model} {rows[r.model].speedup:.2f}x, {rows[r.model].memory:.2f}x" for r in results if r.model in rows)
    table.caption = f"Medians of {ROUNDS} rounds. With more care, at 224x224 on an EPYC with two cores: {careful}."
    table.caption_justify = "left"
    return table


def bar(share: float, colour: str) -> Text:
    """A bar of that share of eager's, which is as long as the grey one."""
    width = BAR // 2
    filled = min(width, round(width * share))
    return Text.assemble(("█" * filled, colour), ("█" * (width - filled), "bright_black"))


def what_next() -> Text:
    """Three lines."""
    lines = (
        ("your own model: ", "bnrestructure plan your_file.py:your_function", ", then bench in place of plan"),
        ("in your script: ", "bnrestructure.restructure(model)", ", and train as before"),
        ("to read on:     ", "docs/get-started.md", ", and docs/results.md for what was measured with care"),
    )
    text = Text("\nNext\n", style="bold")
    for before, command, after in lines:
        text.append(f"  {before}", "not bold").append(command, "not bold cyan").append(f"{after}\n", "not bold")
    return text


if __name__ == "__main__":
    sys.exit(main())
