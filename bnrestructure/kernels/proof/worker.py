"""A proving process: ``python -m bnrestructure.kernels.proof.worker`` takes kinds of calls, a line of JSON each, and answers what is wrong.

A request is {"call": a pickled call of blanks in base64, "kernels": a module, "device", "share" (of its free memory), "precision",
"threads", "benchmark" (cuDNN's), "by": the implementation that is to answer, "race": those that are timed instead, "choices": the asking
process's measured ones, where the call is made of others}. An answer is {"fault": null or a line}, with "passing": true where the next
process may find otherwise (memory), or {"milliseconds": those of each}. After any error the process ends, and says "last": true; the
device may be of no more use to it.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import pickle
import sys
import traceback
from typing import Any

import torch

from bnrestructure.core.errors import first_line
from bnrestructure.core.shortage import is_out_of_memory
from bnrestructure.kernels import tuning
from bnrestructure.kernels.folded import for_dimensions
from bnrestructure.kernels.proof.check import KernelRaisedError, fault
from bnrestructure.kernels.proof.kinds import precision
from bnrestructure.kernels.proof.prover import set_precision
from bnrestructure.kernels.proof.race import race

__all__ = ["main"]


def main() -> int:
    """Until the input ends, or something fails."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    for line in sys.stdin:
        answer, usable = _answer(json.loads(line))
        print(json.dumps(answer | {"last": not usable}), file=answers, flush=True)
        if not usable:
            return 1
    return 0


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the answer, whether this process can go on)."""
    try:
        device = torch.device(request["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
            _take_a_share(request["share"])
        if precision() != request["precision"]:
            set_precision(request["precision"])
        kernels = importlib.import_module(request["kernels"]).KERNELS
        kernels.description()  # says what machine this is, whose choices come next
        if request["choices"] is not None:
            tuning.adopt(request["choices"])
        torch.set_num_threads(request["threads"])
        torch.backends.cudnn.benchmark = request["benchmark"]
        call = pickle.loads(base64.b64decode(request["call"]))
        if request["race"] is not None:
            return {"fault": None, "milliseconds": race(kernels.convolutions, request["race"], call, device)}, True
        by = request["by"]
        one = for_dimensions(kernels, len(call.operand.shape)) if by is None else kernels.convolutions.by(by)
        return {"fault": fault(one, call, device)}, True
    except Exception as error:  # what is not the kernels' own: a device for one process alone, a package that this one does not find
        traceback.print_exc()
        if is_out_of_memory(error) or "NOT_INITIALIZED" in str(error):  # so cuBLAS puts it
            return {"fault": "out of memory beside what else is on the device", "passing": True}, False
        if isinstance(error, KernelRaisedError):
            return {"fault": str(error)}, False
        return {"fault": f"it could not be proved: {type(error).__name__}: {first_line(error)[:300]}", "passing": True}, False


def _take_a_share(share: float) -> None:
    """Leave the memory that is free to the training process, but for this share of it."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + share * free) / total))


if __name__ == "__main__":
    sys.exit(main())
