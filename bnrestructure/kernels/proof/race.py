"""A node's implementations timed beside each other, on numbers that no cache holds any more when their turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.core.shortage import is_out_of_memory
from bnrestructure.kernels import tuning
from bnrestructure.kernels.choice import Convolutions
from bnrestructure.kernels.proof.draw import Drawn
from bnrestructure.kernels.proof.kinds import Blank, mapped

__all__ = ["race"]

#: A run goes through copies of the call: until they are more bytes than a cache holds, but no more than so many.
_ROTATED_BYTES, _FEWEST, _MOST = 1 << 28, 2, 8
#: Training goes on meanwhile, on this device: the shortest of many is one that it did not disturb.
_FEWEST_TURNS, _MOST_TURNS = 4, 20
#: Seconds that these may take altogether, if not fewer turns take longer.
_SECONDS = 1.0


def race(convolutions: Convolutions, names: Sequence[str], blanks: Any, device: torch.device) -> dict[str, float]:
    """The milliseconds of a call of this kind by each implementation; one that cannot answer it, or has too little memory, is left out."""
    copies = [Drawn(blanks, device, seed).call for seed in range(_copies(blanks))]
    runs: dict[str, Callable[[], None]] = {}
    for name in names:
        run = partial(_run, convolutions, name, copies)
        try:
            run()
            runs[name] = convolutions.rule.prepared(run, device)
        except Exception as error:  # of memory, by the names that Triton, cuDNN and CUDA graphs have for it; the rest is raised again
            if not (isinstance(error, UnsupportedCallError) or is_out_of_memory(error)):
                raise
    if not runs:
        return {}
    timer = convolutions.rule.timer(copies[0].x)
    seconds = sum(timer(run) for run in runs.values()) / 1e3
    times = tuning.shortest_times(runs, timer, max(_FEWEST_TURNS, min(_MOST_TURNS, int(_SECONDS / seconds))))
    return {name: ms / len(copies) for name, ms in times.items()}


def _run(convolutions: Convolutions, name: str, copies: Sequence[Any]) -> None:
    with torch.no_grad():
        for call in copies:
            convolutions.by(name).run(call)


def _copies(blanks: Any) -> int:
    held: list[int] = []
    mapped(blanks, Blank, lambda _, blank: held.append(math.prod(blank.shape) * blank.dtype.itemsize))
    return min(_MOST, max(_FEWEST, -(-_ROTATED_BYTES // max(sum(held), 1))))
