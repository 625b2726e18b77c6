"""Benchmark every model of the README's table and keep the figures: ``python benchmarks/run_all.py``.

Each model and dtype is one ``bnrestructure bench`` command, whose figures go into benchmarks/results/<cpu>-<date>.json
as soon as they are there: a run that was interrupted goes on where it stopped. At the end (or with --table alone) the
file is printed as a table in Markdown. The goals are those of a 2-core AVX-512 server at batch 16, 224x224.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

#: model -> (fp32 speed-up, bf16 speed-up, peak memory) to reach
GOALS: dict[str, tuple[float, float, float]] = {
    "densenet121": (1.35, 1.35, 0.33),
    "densenet201": (1.35, 1.35, 0.33),
    "resnet50": (1.12, 1.12, 0.80),
    "mobilenet_v2": (1.50, 1.50, 0.70),
    "efficientnet_b0": (1.30, 1.50, 0.75),
    **dict.fromkeys(
        (
            "regnet_y_400mf",
            "shufflenet_v2_x1_0",
            "vgg16_bn",
            "googlenet",
            "mnasnet1_0",
            "resnext50_32x4d",
            "inception_v3",
        ),
        (1.00, 0.98, 0.95),
    ),
}
#: Models that do not take 224x224: inception_v3's auxiliary head needs the size that it was made for.
SIZES = {"inception_v3": "299"}
#: The model and dtype whose ladder is in the README.
LADDER = ("densenet121", "fp32")


def main() -> int:
    arguments = _arguments()
    path = arguments.results or RESULTS / f"{_cpu()}-{dt.date.today().isoformat()}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    failed = []
    for model in arguments.models if not arguments.table else ():
        for dtype in arguments.dtypes:
            key = f"{model} {dtype}"
            if key in results and not arguments.again:
                print(f"{key}: already in {path.name}", file=sys.stderr)
                continue
            found = _bench(model, dtype, arguments)
            if found is None:
                failed.append(key)
                continue
            results[key] = found
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(markdown(results)))
    if failed:
        print(f"no figures for {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(GOALS), help="torchvision names (default: the table's)")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--input-size", default="224")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--malloc", choices=("default", "tuned", "both"), default="both")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (adds minutes for each model)")
    parser.add_argument("--also", default="", metavar="OPTIONS", help="further options of each command: --also='--rivals --against no-bn'")
    parser.add_argument("--results", type=Path, help="file to continue or to print")
    parser.add_argument("--again", action="store_true", help="measure what is in the file already, too")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    return parser.parse_args()


def _bench(model: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of one command; None, with the reason on stderr, when it has none to give."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        size = SIZES.get(model, arguments.input_size)
        options = ["--batch", str(arguments.batch), "--input-size", size, "--rounds", str(arguments.rounds)]
        options += ["--dtype", dtype, "--malloc", arguments.malloc, "--backend", arguments.backend]
        options += ["--compile"] if arguments.compile else []
        options += ["--ladder"] if (model, dtype) == LADDER else []
        options += shlex.split(arguments.also)
        shown = ["bnrestructure", "bench", model, *options]
        print("$", *shown, file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "bnrestructure.cli.main", *shown[1:], "--json", str(figures)]
        status = subprocess.run(command, stdout=sys.stderr).returncode
        if status != 0:
            print(f"{model} {dtype}: exit status {status}", file=sys.stderr)
            return None
        return json.loads(figures.read_text()) | {"command": shlex.join(shown)}


def _cpu() -> str:
    """The processor's name, fit for a file's name."""
    from bnrestructure.report.environment import describe_environment

    return re.sub(r"[^a-z0-9]+", "-", describe_environment()["cpu"]["name"].lower()).strip("-")


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The table: a row for each model, dtype and allocator setting, and what was reached of its goals."""
    if not results:
        yield "No results yet."
        return
    environment = next(iter(results.values()))["environment"]
    cpu = environment["cpu"]
    yield (
        f"{cpu['name']} ({cpu['instructions']}), {cpu['threads']} threads, torch {environment['packages']['torch']}, "
        f"bnrestructure {environment['commit'] or environment['bnrestructure']}, {environment['date'][:10]}"
    )
    yield ""
    columns = (
        "model | dtype | malloc | fastest rival | its step | ours | speed-up [quartiles] | goal | saved | peak | goal"
    )
    yield f"| {columns} |"
    yield "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|"
    for key, result in results.items():
        model, dtype = key.split()
        for section in result["sections"]:
            yield _row(model, dtype, section)
    slower = [
        f"{key} ({section['malloc']} malloc)" for key, result in results.items() for section in result["sections"]
        if section["comparison"]["step"]["ratio"]["median"] < 1
    ]  # fmt: skip
    if slower:
        yield ""
        yield f"Slower than the fastest rival: {', '.join(slower)}."


def _row(model: str, dtype: str, section: dict[str, Any]) -> str:
    compared = section["comparison"]
    step, ratio = compared["step"], compared["step"]["ratio"]
    fp32, bf16, memory = GOALS.get(model, (None, None, None))
    goal = fp32 if dtype == "fp32" else bf16
    peak = compared.get("peak_bytes")
    cells = [
        model, dtype, section["malloc"], compared["against"],
        f"{step['theirs'] * 1e3:.0f} ms", f"{step['ours'] * 1e3:.0f} ms",
        f"{ratio['median']:.2f}x [{ratio['q1']:.2f}-{ratio['q3']:.2f}]", _goal(goal, ratio["median"], above=True),
        _bytes(compared.get("saved_bytes")), _bytes(peak),
        _goal(memory, None if peak is None else peak["ratio"], above=False),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _goal(goal: float | None, reached: float | None, *, above: bool) -> str:
    if goal is None:
        return ""
    sign, met = (
        (">=", reached is not None and reached >= goal) if above else ("<=", reached is not None and reached <= goal)
    )
    verdict = "" if reached is None else " met" if met else " **missed**"
    return f"{sign} {goal:.2f}x{verdict}"


def _bytes(sides: dict[str, Any] | None) -> str:
    if sides is None or sides["ratio"] is None:
        return ""
    return f"{sides['ratio']:.2f}x ({sides['theirs'] / 1e6:.0f} -> {sides['ours'] / 1e6:.0f} MB)"


if __name__ == "__main__":
    sys.exit(main())
