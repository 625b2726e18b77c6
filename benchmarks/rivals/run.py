"""Time a training step of PyTorch (eager and restructured), TensorFlow and JAX in turns: see README.md beside this file."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = ("densenet121", "densenet201", "resnet50", "mobilenet_v2")
_HERE_TOO = sys.executable
#: Name -> (interpreter, script, variant).
CONTENDERS = {
    "PyTorch eager": (_HERE_TOO, "pytorch_step.py", "eager"),
    "TensorFlow": (str(HERE / ".venv-tensorflow/bin/python"), "tensorflow_step.py", "graph"),
    "TensorFlow, XLA": (str(HERE / ".venv-tensorflow/bin/python"), "tensorflow_step.py", "xla"),
    "JAX": (str(HERE / ".venv-jax/bin/python"), "jax_step.py", ""),
    "restructured": (_HERE_TOO, "pytorch_step.py", "restructured"),
}
_VENVS = {".venv-tensorflow": ["tensorflow-cpu"], ".venv-jax": ["jax", "flax"]}


def main() -> int:
    options = _options()
    if options.set_up:
        return _set_up()
    results = {}
    for model in options.models:
        results[f"{model} {options.dtype}"] = found = measure(model, options)
        for line in table(model, options, found):
            print(line, flush=True)
    if options.json is not None:
        about = {"command": sys.argv, "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")}
        options.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--set-up", action="store_true", help="make the venvs, and do nothing else")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := [model for model in options.models if model not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r} (models: {', '.join(MODELS)})")
    missing = [CONTENDERS[name][0] for name in options.contenders if not Path(CONTENDERS[name][0]).exists()]
    if missing and not options.set_up:
        parser.error(f"there is no {missing[0]}: run with --set-up first, or leave it out with --contenders")
    return options


def _set_up() -> int:
    for name, packages in _VENVS.items():
        subprocess.run([sys.executable, "-m", "venv", str(HERE / name)], check=True)
        subprocess.run([str(HERE / name / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)
    return 0


class Worker:
    """One framework's process."""

    def __init__(self, name: str, model: str, options: argparse.Namespace) -> None:
        interpreter, script, variant = CONTENDERS[name]
        command = [interpreter, str(HERE / script), model, "--batch", str(options.batch), "--size", str(options.size)]
        command += ["--dtype", options.dtype, "--threads", str(options.threads), "--variant", variant]
        self.name = name
        self.words = (HERE / f".{script}-{variant}.log").open("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True)
        self.versions = self._answer()["versions"]

    def ask(self, command: str) -> dict[str, Any]:
        """What it answers. Raises RuntimeError with its last words when it has died."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.words.seek(0)
            raise RuntimeError(f"{self.name} ended: {self.words.read().strip()[-600:]}")
        return json.loads(line)

    def end(self) -> None:
        """Let it end, and wait for that."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.words.close()


def measure(model: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of each contender's step, round by round, its last loss, and its resident peak after the warm-up."""
    workers = [Worker(name, model, options) for name in options.contenders]
    found: dict[str, dict[str, Any]] = {worker.name: {"versions": worker.versions, "seconds": []} for worker in workers}
    try:
        for i in range(-options.warmup, options.rounds):
            for worker in workers:
                if i == 0:
                    worker.ask("reset")
                answer = worker.ask("step")
                if i >= 0:
                    found[worker.name]["seconds"].append(answer["seconds"])
                found[worker.name]["loss"] = answer["loss"]
        for worker in workers:
            found[worker.name]["resident_bytes"] = worker.ask("resident")["bytes"]
    finally:
        for worker in workers:
            worker.end()
    return found


def table(model: str, options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: medians, and ratios paired by round against the restructured step (or the last contender)."""
    last = list(found)[-1]
    lines = [
        f"{model}, batch {options.batch}, {options.size}x{options.size}, {options.dtype}, {options.threads} threads", "",
        f"| | step, ms | its time in {last}'s | resident, MB | loss |", "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, result in found.items():
        ratio = statistics.median(a / b for a, b in zip(result["seconds"], found[last]["seconds"], strict=True))
        lines.append(
            f"| {name} | {statistics.median(result['seconds']) * 1e3:.0f} | {ratio:.2f}x | {result['resident_bytes'] / 1e6:.0f} "
            f"| {result['loss']:.3f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
