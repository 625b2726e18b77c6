"""The CPU's kernels with one fault among them, as a device would have them whose kernels nobody has seen: for the tests of kernels/proof.

$BNR_PLANTED is the fault, and the type of call that has it: ``wrong ConvForward``. The proving processes import this file, too.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from bnrestructure.kernels.cpu import KERNELS as REAL


class PlantedKernels:
    """``answered`` counts the calls that this process had answered, by type."""

    def __init__(self) -> None:
        self.answered: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(REAL, name)

    def run(self, call: Any) -> Any:
        fault, _, kind = os.environ.get("BNR_PLANTED", "").partition(" ")
        name = type(call).__name__
        self.answered[name] = self.answered.get(name, 0) + 1
        if name != kind:
            return REAL.run(call)
        if fault == "crashes":
            os.abort()
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(600)
        if fault == "raises":
            raise RuntimeError("ptxas does not like it")
        if fault == "short":
            raise torch.OutOfMemoryError("CUDA out of memory")
        found = REAL.run(call)
        first = next(x for x in found if x is not None and x.dim() > 2) if isinstance(found, tuple) else found
        if fault == "bent":
            first.mul_(1.02)
        elif fault == "slow":
            time.sleep(0.05)
        elif fault == "wrong":
            first[0, 0, 0, 0] += 0.05 * first.abs().max()
        elif fault == "racy":
            first[..., -1:] *= 1 + 2**-20 * (self.answered[name] % 2)
        elif fault == "strays":
            call.x[0, 0, 0, 0] += 1
        return found


KERNELS = PlantedKernels()
