"""Random spoiled calls: a fused node gives what the plain one gives, or its error, and never takes the process with it.

    python tests/kernels/fuzz_boundary.py --cases 100000 --seed 1

Two kinds of cases, each forward and backward. A *node* of ``ops`` with one or two spoiled arguments, on the compiled kernels and on the
reference: both must fail, or both give the same. A small *model* with a spoiled parameter, buffer or input, restructured and as it was,
likewise. Tensors are spoiled in device, dtype, size, sign (the negative bit), strides (expanded, overlapping, with gaps) and storage
(shorter than the tensor), before forward or between forward and backward. Where there is no memory behind a tensor PyTorch's own kernels
read what is not theirs: an error is expected then.

The cases run in child processes; one that dies is reported with its signal and the seed of the case.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from fuzz_cases import Case, model_case, node_case
from torch import Tensor

__all__ = ["Findings", "fuzz", "outcome"]

#: A case's share of models: they take ten times as long.
_MODELS = 0.1

#: What PyTorch's own operators refuse and the kernels can do: odd strides of a weight, an average over no dimensions, a maximum where an
#: input that was made smaller since has no pixel.
_LIMITS_OF_PYTORCH = ("grad_weight must be contiguous", "expected to be in range of [-2, 1], but got 2", "is out of bounds for dimension")


@dataclass
class Findings:
    """What became of the cases: how many of each kind, and those that failed, as "seed: what"."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def outcome(run: Callable[[], list[Tensor | None]]) -> tuple[str | None, list[Tensor | None]]:
    """(the error's line, or None; the results)."""
    try:
        return None, run()
    except (AttributeError, NameError):  # a fault of the harness, which both sides would share
        raise
    except Exception as error:  # whatever a spoiled tensor makes of a node: which of the errors it is, is not compared
        if "values to unpack" in str(error):  # likewise a fault of the harness
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0], []


def check(case: Case) -> tuple[str, str | None]:
    """(kind of outcome, what is wrong or None)."""
    error, found = outcome(case.fused)
    if case.without_memory:
        return ("no memory: error", None) if error else ("no memory: ran", f"{case.name} ran on a tensor without memory")
    plain_error, expected = outcome(case.plain)
    if plain_error and any(words in plain_error for words in _LIMITS_OF_PYTORCH):
        return "PyTorch cannot", None
    if error or plain_error:
        both = bool(error and plain_error)
        return ("error", None) if both else ("one error", f"{case.name}: fused {error or 'ran'}; plain {plain_error or 'ran'}")
    for i, (value, true) in enumerate(zip(found, expected, strict=True)):
        if wrong := difference(value, true, case.tolerance):
            return "different", f"{case.name}: result {i}: {wrong}"
    return "same", None


def difference(value: Tensor | None, true: Tensor | None, tolerance: float) -> str | None:
    """How two results differ, or None."""
    if value is None or true is None:
        return None if value is true else f"{'a tensor' if true is None else 'nothing'}, which the plain one does not give"
    if value.shape != true.shape or value.dtype != true.dtype:
        return f"{value.dtype} {list(value.shape)} for {true.dtype} {list(true.shape)}"
    a, b = value.detach().double(), true.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return "other values are not finite"
    scale = max(1.0, float(b.nan_to_num(0, 0, 0).abs().max())) if b.numel() else 1.0
    error = float((a - b).nan_to_num(0, 0, 0).abs().max()) / scale if b.numel() else 0.0
    return f"differs by {error:.1e}" if error > tolerance else None


def run_cases(first: int, last: int) -> None:
    """The child: a line before each case and one after it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for seed in range(first, last):
        print(f"begin {seed}", flush=True)
        rng = random.Random(seed)
        torch.manual_seed(seed)
        case = model_case(rng) if rng.random() < _MODELS else node_case(rng)
        kind, wrong = check(case)
        print(f"end {seed} {kind}\t{wrong or ''}", flush=True)


def fuzz(seed: int, cases: int, batch: int = 2000, progress: Callable[[str], None] | None = None) -> Findings:
    """Run ``cases`` cases, of the seeds from ``seed`` on, in child processes of up to ``batch`` cases each."""
    findings, at, end = Findings(), seed, seed + cases
    while at < end:
        command = [sys.executable, __file__, "--child", str(at), str(min(end, at + batch))]
        child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        begun = at - 1
        for line in child.stdout.splitlines():
            word, _, rest = line.partition(" ")
            if word == "begin":
                begun = int(rest)
            elif word == "end":
                of, _, rest = rest.partition(" ")
                kind, _, wrong = rest.partition("\t")
                findings.counts[kind] += 1
                if wrong:
                    findings.failures.append(f"{of}: {wrong}")
        if child.returncode:
            what = f"signal {-child.returncode}" if child.returncode < 0 else child.stderr.strip()[-2000:]
            findings.failures.append(f"{begun}: {what}")
            if begun < at:  # it did not even start
                break
        at = begun + 1
        if progress is not None:
            progress(f"{at - seed} cases, {len(findings.failures)} failures")
    return findings


def main() -> int:
    """The command line; exit status 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6 * 10**6)
    parser.add_argument("--child", type=int, nargs=2, metavar=("FIRST", "LAST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_cases(*options.child)
        return 0
    print(f"seed {options.seed}", flush=True)
    findings = fuzz(options.seed, options.cases, progress=lambda line: print(line, flush=True))
    print(*findings.failures, sep="\n")
    print(dict(findings.counts))
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())


