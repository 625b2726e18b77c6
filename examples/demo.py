"""What ``make demo`` shows: two networks restructured, checked, measured and trained, in a few minutes on two cores.

Nothing is downloaded: the photos and the digits ship with scikit-learn, the networks start from random weights. Times
are of this machine as it is now and are printed whichever way they went; ``bnrestructure bench`` measures with more
care.
"""

from __future__ import annotations

import copy
import io
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from photos import photo_batch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train_digits import Comparison, compare, draw

import bnrestructure
from bnrestructure.bench.contenders import EAGER_LAST, RESTRUCTURED
from bnrestructure.bench.paired import PairedTimings, time_paired
from bnrestructure.bench.process import run_job
from bnrestructure.bench.settings import Settings
from bnrestructure.cli.main import main as command_line
from bnrestructure.kernels.cpu import processor

MODELS = ("densenet121", "resnet50")
BATCH, SIZE = 16, 128
CHECKED_BATCH, CHECKED_SIZE = 4, 96
ROUNDS = 8
EPOCHS = 8
PICTURES = Path("build/demo")

console = Console()


@dataclass
class Result:
    """What the last table says of one model; (before, after) pairs are the original and the restructured model."""

    model: str
    report: bnrestructure.VerificationReport
    saved: tuple[int, int]
    peak: tuple[int, int]
    timings: PairedTimings


def main() -> int:
    started = time.perf_counter()
    console.print(f"PyTorch {torch.__version__}, {processor.name()}, {torch.get_num_threads()} threads", highlight=False)
    results = []
    for name in MODELS:
        console.rule(f"[bold]{name}")
        plan_and_graph(name)
        results.append(measured(name))
    console.rule("[bold]training on handwritten digits")
    console.print(digits_table([digits(net) for net in ("resnet", "densenet")]))
    console.print(f"loss curves: {PICTURES}/*.png")
    console.rule("[bold]summary")
    console.print(summary(results))
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return 0 if all(result.report.ok for result in results) else 1


def plan_and_graph(name: str) -> None:
    """Excerpts of the plan and of the rewritten graph, by the command line's own functions."""
    excerpt(["plan", name, "--batch", str(BATCH), "--input-size", str(SIZE)], first=12, last=4)
    excerpt(["show", name], first=24)


def excerpt(arguments: list[str], first: int, last: int = 0) -> None:
    """The first and the last lines of what a ``bnrestructure`` command prints."""
    command = "bnrestructure " + " ".join(arguments)
    console.print(f"\n$ {command}", style="bold", highlight=False)
    printed = io.StringIO()
    with redirect_stdout(printed):
        status = command_line(arguments)
    if status != 0:
        raise RuntimeError(f"{command}: exit status {status}")
    lines = printed.getvalue().splitlines()
    left_out = max(0, len(lines) - first - last)
    middle = [f"... {left_out} more lines ..."] if left_out else []
    print("\n".join([*lines[:first], *middle, *lines[first + left_out :]]))


def measured(name: str) -> Result:
    """Verify, weigh and time one model against itself before restructuring."""
    original = build(name)
    restructured = bnrestructure.restructure(copy.deepcopy(original))
    with console.status(f"{name}: checking against the original in float64, on photos"):
        report = bnrestructure.verify(original, photo_batch(CHECKED_BATCH, CHECKED_SIZE)[0], steps=1)
    console.print(f"\n{report}", highlight=False)
    photos, labels = photo_batch(BATCH, SIZE)
    with console.status(f"{name}: memory of a training step, each version in a process of its own"):
        memory = [memory_of(name, variant) for variant in (EAGER_LAST, RESTRUCTURED)]
    with console.status(f"{name}: timing, the two versions by turns"):
        steps = {"eager": Step(original, photos, labels), "restructured": Step(restructured, photos, labels)}
        timings = time_paired(steps, rounds=ROUNDS)
    saved, peak = ((memory[0][key], memory[1][key]) for key in ("saved_bytes", "peak_bytes"))
    return Result(name, report, saved, peak, timings)


def build(name: str) -> nn.Module:
    """A freshly initialised torchvision model, the same at each call."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=2).to(memory_format=torch.channels_last)


def memory_of(name: str, variant: str) -> dict[str, int]:
    """saved_bytes and peak_bytes of a training step, from a fresh process: an earlier step would hide the peak."""
    settings = Settings(name, batch=BATCH, input_size=(SIZE, SIZE))
    return run_job("memory", settings, variant=variant)


@dataclass
class Step:
    """One training step: forward, loss, backward, SGD."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def digits(net: str) -> Comparison:
    """Train a small network with and without restructuring, and draw the loss curves."""
    with console.status(f"a small {net}, {EPOCHS} epochs, with and without restructuring"):
        comparison = compare(net, EPOCHS)
    draw(comparison, PICTURES / f"digits_{net}.png")
    return comparison


def summary(results: list[Result]) -> Table:
    """One row per model, before -> after."""
    setting = f"CPU, {torch.get_num_threads()} threads, float32, channels_last, batch {BATCH}, {SIZE} x {SIZE}"
    table = Table(title=f"a training step, before -> after restructuring ({setting})")
    for heading in ("model", "equal", "saved for backward", "peak memory", "step time (median)", "before / after"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for result in results:
        ratio = result.timings.ratio("eager", "restructured")
        before, after = (result.timings.spread(version).median for version in ("eager", "restructured"))
        table.add_row(
            result.model,
            "[green]yes" if result.report.ok else "[red]NO",
            arrow(result.saved),
            arrow(result.peak),
            f"{before * 1e3:.0f} -> {after * 1e3:.0f} ms",
            f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})",
        )
    table.caption = (
        "equal: float64 to 1e-9, and in float32 no further from the float64 truth than eager's own error times two; "
        "before / after: paired by round, median and quartiles, above 1 is faster"
    )
    return table


def arrow(pair: tuple[int, int]) -> str:
    before, after = (size / 2**20 for size in pair)
    return f"{before:.0f} -> {after:.0f} MiB ({after / before:.2f}x)"


def digits_table(comparisons: list[Comparison]) -> Table:
    table = Table(title=f"handwritten digits, {EPOCHS} epochs: final loss and test accuracy")
    for heading in ("network", "eager", "restructured", "eager again, contiguous"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for c in comparisons:
        runs = (c.eager, c.restructured, c.control)
        table.add_row(f"small {c.net}", *(f"{run.final_loss:.4f}  {run.accuracy:.1%}" for run in runs))
    return table


if __name__ == "__main__":
    sys.exit(main())
