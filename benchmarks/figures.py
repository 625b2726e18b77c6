"""The measured figures that the README, the documentation and the demo quote: all of them come from here, and here from benchmarks/results.

    python benchmarks/figures.py            the README's tables, in Markdown
    python benchmarks/figures.py --all      every row of every results file
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

__all__ = [
    "FAMILIES",
    "FILES",
    "FRAMEWORK_FILES",
    "FRONT",
    "LADDER_ROW",
    "RIVAL_FILES",
    "Row",
    "families",
    "frameworks",
    "front_rows",
    "ladder",
    "markdown",
    "rivals",
    "rows",
    "without_batch_norm",
    "worst",
]

RESULTS = Path(__file__).parent / "results"

#: Results file -> the machine as a table names it.
FILES = {
    "amd-epyc-2-cores-2026-11-22.json": "EPYC",
    "intel-xeon-2-cores-2026-11-23.json": "Xeon",
    "intel-xeon-2-cores-video-2026-11-23.json": "Xeon",
}
#: Results files of ``bench --compile --rivals --against no-bn``, and of benchmarks/rivals/run.py.
RIVAL_FILES = ("amd-epyc-2-cores-rivals-2026-11-29.json",)
FRAMEWORK_FILES = ("amd-epyc-2-cores-frameworks-fp32-2026-11-29.json", "amd-epyc-2-cores-frameworks-bf16-2026-11-29.json")
#: The README's rows (model, dtype, machine): one of each family, and the worst of all.
FRONT = (
    ("densenet121", "fp32", "EPYC"),
    ("mobilenet_v2", "fp32", "EPYC"),
    ("efficientnet_b0", "fp32", "EPYC"),
    ("resnet50", "fp32", "EPYC"),
    ("resnet50", "bf16", "EPYC"),
    ("vgg16_bn", "bf16", "EPYC"),
    ("r3d_18", "bf16", "Xeon"),
)
#: Who gains how much: family -> models of the results files.
FAMILIES = {
    "DenseNets": ("densenet121", "densenet201"),
    "depthwise: MobileNet, EfficientNet, MnasNet": ("mobilenet_v2", "efficientnet_b0", "mnasnet1_0"),
    "ShuffleNet": ("shufflenet_v2_x1_0",),
    "Inception": ("googlenet", "inception_v3"),
    "residual: ResNet, ResNeXt, RegNet": ("resnet50", "resnext50_32x4d", "regnet_y_400mf"),
    "VGG with batch norm": ("vgg16_bn",),
    "video: R(2+1)D, R3D": ("r2plus1d_18", "r3d_18"),
}
LADDER_ROW = ("densenet121 fp32", "amd-epyc-2-cores-2026-11-22.json")


@dataclass(frozen=True)
class Row:
    """One comparison with the fastest rival. Times are median seconds of a step, memory is bytes, (before, after)."""

    model: str
    dtype: str
    machine: str
    malloc: str
    rival: str
    step: tuple[float, float]
    speedup: float
    saved: tuple[int, int]
    peak: tuple[int, int]
    date: str
    commit: str
    file: str

    @property
    def memory(self) -> float:
        """Peak memory as a share of eager's."""
        return self.peak[1] / self.peak[0]


def rows() -> list[Row]:
    """Every row of every results file, in the files' order."""
    return [row for name in FILES for row in _rows_of(name)]


def _rows_of(name: str) -> Iterator[Row]:
    for key, result in json.loads((RESULTS / name).read_text()).items():
        model, dtype = key.split()
        environment = result["environment"]
        for section in result["sections"]:
            compared = section["comparison"]
            sides = {figure: (compared[figure]["theirs"], compared[figure]["ours"]) for figure in ("step", "saved_bytes", "peak_bytes")}
            yield Row(
                model, dtype, FILES[name], section["malloc"], compared["against"], sides["step"], compared["step"]["ratio"]["median"],
                sides["saved_bytes"], sides["peak_bytes"], environment["date"][:10], environment["commit"], name,
            )  # fmt: skip


def front_rows() -> list[Row]:
    """The README's rows; where both allocator settings were timed, the tuned one (the lower speed-up)."""
    found = {(row.model, row.dtype, row.machine): row for row in rows() if row.malloc == "tuned"}
    return [found[key] for key in FRONT]


def worst() -> Row:
    """The lowest speed-up of all rows."""
    return min(rows(), key=lambda row: row.speedup)


def rivals(name: str) -> Iterator[str]:
    """The lines of a table of a rivals' results file: each variant's step, what it holds at most, and both in units of ours."""
    yield "| model | dtype | variant | step, ms | our speed-up | memory held, MB | ours is |"
    yield "|---|---|---|--:|--:|--:|--:|"
    for key, result in json.loads((RESULTS / name).read_text()).items():
        model, dtype = key.split()
        section = result["sections"][-1]
        ours = section["variants"]["restructured"]
        for variant, found in section["variants"].items():
            speedup = section["speedups"].get(variant, {"median": 1.0})["median"]
            held = found.get("held_bytes")
            memory = f"{held / 1e6:.0f} | {ours['held_bytes'] / held:.2f}x" if held else " | "
            yield f"| {model} | {dtype} | {variant} | {found['step']['median'] * 1e3:.0f} | {speedup:.2f}x | {memory} |"


def without_batch_norm() -> dict[str, float]:
    """"model dtype" -> the time of an eager step with every batch norm left out, in restructured steps."""
    found = {}
    for name in RIVAL_FILES:
        for key, result in json.loads((RESULTS / name).read_text()).items():
            found[key] = result["sections"][-1]["speedups"]["eager without batch norm"]["median"]
    return found


def frameworks(name: str) -> Iterator[str]:
    """The lines of a table of a file of benchmarks/rivals/run.py: median step of each framework, and in restructured steps, by round."""
    yield "| model | dtype | framework | step, ms | our speed-up | resident, MB |"
    yield "|---|---|---|--:|--:|--:|"
    for key, found in json.loads((RESULTS / name).read_text())["results"].items():
        model, dtype = key.split()
        ours = found["restructured"]["seconds"]
        for framework, result in found.items():
            speedup = median(theirs / own for theirs, own in zip(result["seconds"], ours, strict=True))
            step, resident = median(result["seconds"]) * 1e3, result["resident_bytes"] / 1e6
            yield f"| {model} | {dtype} | {framework} | {step:.0f} | {speedup:.2f}x | {resident:.0f} |"


def families() -> Iterator[str]:
    """The lines of a table: for each family the least and the largest of all its rows, of both dtypes and machines."""
    yield "| family | speed-up | peak memory |"
    yield "|---|--:|--:|"
    for family, models in FAMILIES.items():
        own = [row for row in rows() if row.model in models]
        yield f"| {family} | {_range([row.speedup for row in own])} | {_range([row.memory for row in own])} |"


def _range(values: list[float]) -> str:
    return f"{min(values):.2f}x to {max(values):.2f}x"


def ladder() -> dict[str, dict[str, Any]]:
    """The paper's ladder under the tuned allocator: rung -> ``step`` (seconds), ``sweeps``, ``saved`` and ``peak`` (bytes)."""
    key, name = LADDER_ROW
    result = json.loads((RESULTS / name).read_text())[key]
    section = next(section for section in result["sections"] if section["malloc"] == "tuned")
    found = {}
    for rung, variant in section["ladder"].items():
        plan = result["plan"]["restructured"]["bytes_before"] if rung == "baseline" else result["plan"][rung]["bytes_after"]
        measured = section["variants"][variant]
        found[rung] = {
            "step": measured["step"]["median"], "sweeps": plan, "saved": measured["saved_bytes"], "peak": measured["peak_bytes"],
        }  # fmt: skip
    return found


def markdown(chosen: Iterable[Row], *, full: bool = False) -> Iterator[str]:
    """The lines of a table; ``full``: of one machine, with the allocator, what is saved for backward, and where the row is from."""
    heads = {"model": "---", "dtype": "---", "fastest rival": "---", "step, ms": "--:", "speed-up": "--:", "peak memory": "--:"}
    more = {"saved for backward": "--:", "malloc": "---", "date": "---", "commit": "---"} if full else {"machine": "---"}
    heads |= more
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join(heads.values())}|"
    for row in chosen:
        cells = [
            row.model, row.dtype, row.rival.removeprefix("eager "), f"{row.step[0] * 1e3:.0f} → {row.step[1] * 1e3:.0f}",
            f"**{row.speedup:.2f}x**" + (", slower" if row.speedup < 1 else ""), _memory(row.peak),
        ]  # fmt: skip
        cells += [_memory(row.saved), row.malloc, row.date, row.commit] if full else [row.machine]
        yield "| " + " | ".join(cell.replace(" ", "\u00a0") if full else cell for cell in cells) + " |"


def _memory(sides: tuple[int, int]) -> str:
    return f"{sides[1] / sides[0]:.2f}x ({sides[0] / 1e6:.0f} → {sides[1] / 1e6:.0f} MB)"


def main() -> int:
    everything = "--all" in sys.argv[1:]
    print("\n".join(markdown(rows() if everything else front_rows(), full=everything)))
    print("", *families(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
