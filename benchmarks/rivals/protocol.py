"""What the measuring processes have in common: a training step when a line on stdin says so, its seconds on stdout."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["arguments", "serve"]


def arguments() -> argparse.Namespace:
    """model, batch, size, dtype, variant. The number of threads is set before any framework is imported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--variant", default="")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = str(options.threads)
    return options


def serve(step: Callable[[], float], versions: dict[str, str]) -> None:
    """Answer lines: ``step`` with {"seconds", "loss"}, ``reset`` by forgetting the peak, ``resident`` with {"bytes"}; end at end of file.

    ``step`` waits until its work is done, and returns the loss.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what frameworks print goes to stderr
    before = _status("VmRSS")

    def answer(**data: object) -> None:
        print(json.dumps(data), file=answers, flush=True)

    answer(ready=True, versions=versions)
    for line in sys.stdin:
        command = line.strip()
        if command == "step":
            start = time.perf_counter()
            loss = step()
            answer(seconds=time.perf_counter() - start, loss=loss)
        elif command == "reset":
            Path("/proc/self/clear_refs").write_text("5")
            answer(reset=True)
        elif command == "resident":
            answer(bytes=_status("VmHWM") - before)
        else:
            answer(error=f"unknown command {command!r}")


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")
