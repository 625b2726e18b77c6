"""Checks and times the CUDA kernels and whole training steps on one NVIDIA GPU: ``python benchmarks/gpu.py``.

    python benchmarks/gpu.py                       every part, in order
    python benchmarks/gpu.py --part models         one part, and those it needs
    python benchmarks/gpu.py --seconds 540         be done after this long (the default)
    python benchmarks/gpu.py --retry               run again what failed before
    python benchmarks/gpu.py --dry-run             every path at tiny sizes, in Triton's interpreter: no GPU, no real times

Each part is made of units (a kernel at a shape; a model and a variant), and each unit's result goes into one JSON file as
soon as it is there: a run that was stopped goes on where it stopped, and says what is left. Units run in processes of
their own (gpu_pool.py), so that one that crashes or hangs is a line in the table and no more. Every number is checked
against fp64 before it is timed; a configuration whose numbers are wrong gets no time. What the workers print goes to a
.log file beside the results. Exit status: 1 if something failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_pool import Pool, worker_command
from gpu_results import Results
from gpu_summary import summarise

__all__ = ["main", "run"]

RESULTS = Path(__file__).parent / "results" / "gpu.json"
#: Nothing new is started this long before the end.
_LAST_START = 20.0


def run(chosen: list[str], path: Path, seconds: float, *, dry: bool = False, retry: bool = False) -> int:
    """Run what is not in the file yet, within the time. Returns the exit status."""
    from gpu_units import PARTS, units

    start = time.monotonic()
    results, log = Results(path), path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # several of the workers compile at the same time
    pool = Pool(worker_command(), environment, log, start + seconds)
    left: list[str] = []
    known = {part.name: part for part in PARTS}
    wanted = _with_requirements(chosen, {part.name: part.requires for part in PARTS})

    def go(part: str, names: list[str], workers: int) -> list[str]:
        """Run these; returns those that failed otherwise than by wrong numbers."""
        again = []

        def report(request: dict[str, Any], result: dict[str, Any] | None) -> None:
            name = request["name"]
            if result is None:
                left.append(f"{part}: {name}")
                return
            if part != "environment":
                results.put(part, name, result)
            print(f"[{time.monotonic() - start:4.0f} s] {part}: {name}: {_short(result)}", file=sys.stderr, flush=True)
            if part == "environment" and (refusal := _refusal(result, results)) is not None:
                raise _RefusedError(refusal)
            if "error" in result:
                again.append(name)

        requests = [{"part": part, "name": name, "dry": dry, "ceilings": results.get("ceilings", "ceilings")} for name in names]
        pool.run(requests, workers, known[part].seconds, start + seconds - _LAST_START, report)
        return again

    try:
        for part in (part for part in PARTS if part.name in wanted):
            names = []
            for name in units(part.name, dry):
                before = results.get(part.name, name)
                if part.name != "environment" and before is not None and not (retry and not before["ok"]):
                    continue
                if (reason := _not_to_be_timed(results, part.name, name)) is not None:
                    results.put(part.name, name, {"ok": False, "reason": reason})
                else:
                    names.append(name)
            failed = go(part.name, names, min(part.workers, max(1, (os.cpu_count() or 1) - 2)))
            if failed and part.workers > 1 and part.name != "warm":  # side by side they may have been short of memory: once more, alone
                go(part.name, failed, 1)
    except _RefusedError as refusal:
        print(f"The GPU benchmark cannot run here: {refusal}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. What was done is kept, and the next run goes on from there.", file=sys.stderr)
    finally:
        pool.close()
    if dry:
        print("A dry run: the times below mean nothing.")
    failed = summarise(results.found, wanted)
    for what, which in (("failed", failed), ("left for the next run", left)):
        if which:
            print(f"{len(which)} {what}: {', '.join(which[:6])}{', ...' if len(which) > 6 else ''}")
    print(f"results: {path}")
    return int(bool(failed))


class _RefusedError(Exception):
    """Nothing can be run at all."""


def _refusal(result: dict[str, Any], results: Results) -> str | None:
    """Why the results cannot be begun, or gone on with, on this machine."""
    if not result["ok"]:
        return str(result["error"]).removeprefix("RuntimeError: ")
    if not results.is_of(result):
        return f"{results.path} holds results of another device or other versions: name another file with --results"
    return None


def _with_requirements(chosen: list[str], requires: dict[str, tuple[str, ...]]) -> set[str]:
    found = {"environment", *chosen}
    while (more := found | {before for part in found for before in requires[part]}) != found:
        found = more
    return found


def _not_to_be_timed(results: Results, part: str, name: str) -> str | None:
    """Why this unit gets no time: its numbers are wrong, or were not checked."""
    if part == "kernels":
        if results.get("ceilings", "ceilings") is None or not results.get("ceilings", "ceilings")["ok"]:
            return "the machine's ceilings are not known"
        checked, where = results.get("check", f"bfloat16 {name}"), "check"
    elif part in ("warm", "models", "models of batch 64", "largest batch") and "restructured" in name:
        checked, where = results.get("steps", name.partition(" ")[0]), "steps"
    else:
        return None
    return None if checked is not None and checked["ok"] else f"its numbers are wrong, or were not checked: see the part {where!r}"


def _short(result: dict[str, Any]) -> str:
    """A result in a line, so that it is in the run's output even where the file is lost."""
    return json.dumps(result, default=str)[:300]


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    from checkout import make_importable

    make_importable()
    try:
        from gpu_units import PARTS
    except ImportError as error:
        print(f"The GPU benchmark cannot run here: {error}.", file=sys.stderr)
        return 2
    names = [part.name for part in PARTS if part.name != "environment"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=names, help="may be given several times; every part without it")
    parser.add_argument("--results", type=Path, help=f"the JSON file (default {RESULTS.name} in results/; for a dry run a temporary one)")
    parser.add_argument("--seconds", type=float, default=540, help="be done after this long (default 540)")
    parser.add_argument("--retry", action="store_true", help="run again what failed before")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    options = parser.parse_args(arguments)
    path = options.results
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) / "gpu.json" if options.dry_run else RESULTS
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not options.dry_run:
        os.environ.pop("TRITON_INTERPRET", None)
    return run(options.part or names, path, options.seconds, dry=options.dry_run, retry=options.retry)


if __name__ == "__main__":
    sys.exit(main())
