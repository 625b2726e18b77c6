"""What should take notice of a fault, each a command that fails where it does.

    proofs[:FILE]     tests/proofs, or one file of them
    verify            bnrestructure.verify of small models, on the kernels of the CPU and on the reference
    TEST              any other test, as pytest takes it
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.mutations.tree import ISA, Fault

__all__ = ["noticed", "others"]


def others(fault: Fault) -> tuple[str, ...]:
    """Whom to ask when the guard of the table has seen nothing."""
    return ("tests/kernels",) if fault.is_compiled else ("proofs", "verify", "tests/passes", "tests/test_random_graphs.py")


_VERIFY = """
import sys
sys.path.insert(0, "tests")
import torch
from small_models import SMALL_MODELS, build, input_for
import bnrestructure
for backend in ("reference", "auto"):
    for name in SMALL_MODELS:
        report = bnrestructure.verify(build(name, torch.float32), input_for(name, torch.float32), backend=backend, steps=1)
        if not report.ok:
            sys.exit(f"{name} on {backend}: not equivalent")
"""


def noticed(guard: str, fault: Fault, root: Path) -> str | None:
    """What the guard has to say of the tree, in a line; None where it has nothing to say."""
    kind, _, rest = guard.partition(":")
    if kind == "verify":
        command = [sys.executable, "-c", _VERIFY]
    else:
        target = f"tests/proofs/{rest}" if kind == "proofs" else guard
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=line", target]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "BNRESTRUCTURE_CACHE": str(root / "cache")}
    if fault.is_compiled:
        environment["BNRESTRUCTURE_CPU_ISA"] = ISA
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode in (0, 5):  # 5: no test was collected
        return None
    return next((line for line in reversed([*done.stdout.splitlines(), *done.stderr.splitlines()]) if line.strip()), "it failed")
