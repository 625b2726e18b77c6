"""The CPU's kernels with one fault among them, as a device would have them whose kernels nobody has seen: for the tests of kernels/proof.

$BNR_PLANTED is the fault, the type of call that has it, and which of a convolution's implementations do (by default all of them):
``wrong ConvForward hybrid``. The proving processes import this file, too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bnrestructure.kernels.calls import ConvBackward, ConvForward
from bnrestructure.kernels.choice import Convolutions
from bnrestructure.kernels.cpu import KERNELS as REAL


class PlantedKernels:
    """``answered`` counts the calls that this process had answered, by type; ``chosen`` those of convolutions, by implementation, too."""

    def __init__(self) -> None:
        self.answered: dict[str, int] = {}
        self.chosen: dict[tuple[str, str], int] = {}
        real = REAL.convolutions
        self.convolutions = Convolutions(self, real.rule, {name: Planted(self, name) for name in real.implementations}, real.halves)

    def __getattr__(self, name: str) -> Any:
        return getattr(REAL, name)

    def run(self, call: Any) -> Any:
        self.answered[type(call).__name__] = self.answered.get(type(call).__name__, 0) + 1
        if isinstance(call, ConvForward):
            return self.convolutions.forward(call)
        if isinstance(call, ConvBackward):
            return self.convolutions.backward(call)
        return self.damaged(call, REAL.run, "")

    def damaged(self, call: Any, run: Callable[[Any], Any], by: str) -> Any:
        """The result, with the fault that is planted in this implementation of it."""
        fault, kind, only = [*os.environ.get("BNR_PLANTED", "").split(" ", 2), "", ""][:3]
        if type(call).__name__ != kind or only not in ("", by):
            return run(call)
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
        found = run(call)
        first = next(x for x in found if x is not None and x.dim() > 2) if isinstance(found, tuple) else found
        if fault == "bent":
            first.mul_(1.02)
        elif fault == "slow":
            time.sleep(0.02)
        elif fault == "wrong":
            first[0, 0, 0, 0] += 0.05 * first.abs().max()
        elif fault == "racy":
            self.chosen["racy", by] = self.chosen.get(("racy", by), 0) + 1
            first[..., -1:] *= 1 + 2**-20 * (self.chosen["racy", by] % 2)
        elif fault == "strays":
            call.x[0, 0, 0, 0] += 1
        return found


class Planted:
    """One of the real implementations of the convolution node."""

    def __init__(self, kernels: PlantedKernels, name: str) -> None:
        self._kernels, self._name = kernels, name
        self._real = REAL.convolutions.implementations[name]
        self.finishes_join = self._real.finishes_join

    def forms_sum(self, node: Any) -> bool:
        return self._real.forms_sum(node)

    def forward(self, call: Any, site: Any) -> Any:
        return self._run(call, partial(self._real.forward, site=site))

    def backward(self, call: Any, site: Any) -> Any:
        return self._run(call, partial(self._real.backward, site=site))

    def _run(self, call: Any, run: Callable[[Any], Any]) -> Any:
        made = type(call).__name__, self._name
        self._kernels.chosen[made] = self._kernels.chosen.get(made, 0) + 1
        return self._kernels.damaged(call, run, self._name)


KERNELS = PlantedKernels()
