"""Checks and times the CUDA kernels and whole training steps on one NVIDIA GPU: ``python benchmarks/gpu``.

    python benchmarks/gpu                       every part, in order
    python benchmarks/gpu --part models         one part, and those it needs
    python benchmarks/gpu --seconds 540         be done after this long (the default)
    python benchmarks/gpu --retry               run again what failed before
    python benchmarks/gpu --dry-run             every path at tiny sizes, in Triton's interpreter: no GPU, no real times

Each part is made of units (a kernel at a shape; a model and a variant), and each unit's result goes into one JSON file as
soon as it is there: a run that was stopped goes on where it stopped, and says what is left. Units run in processes of
their own (run.py), so that one that crashes or hangs is a line in the table and no more. Numbers are checked against
fp64 before they are timed; a configuration whose numbers are wrong, or were not checked yet, gets no time. Results of our
code are taken anew when its sources changed. What the workers print goes to a .log file beside the results. Exit status:
1 if something failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.checkout import make_importable

    make_importable()
    try:
        from benchmarks.gpu.run import run
        from benchmarks.gpu.schedule import PARTS
    except ImportError as error:
        print(f"The GPU benchmark cannot run here: {error}.", file=sys.stderr)
        return 2
    names = [name for name in PARTS if name != "environment"]
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
