"""A measuring process: ``python -m bnrestructure.bench.worker`` takes a job as JSON on stdin and answers on stdout.

The answer is lines of JSON: {"total": n}, {"run": name} ..., and at last {"result": ...} or {"error": message}. What
the user's model prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from bnrestructure.bench.settings import Settings
from bnrestructure.core.errors import BNRestructureError

__all__ = ["main"]


def main() -> None:
    """Run the job that stdin holds."""
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    settings = Settings.from_json(request["settings"])
    try:
        import torch

        from bnrestructure.bench.jobs import JOBS, Progress
        from bnrestructure.kernels.proof.prover import waiting_for_proofs

        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(0)
        with waiting_for_proofs():  # what is timed are the kernels, and not what runs until they are proved
            send({"result": JOBS[request["job"]](settings, Progress(send), **request["arguments"])})
    except BNRestructureError as error:
        send({"error": str(error)})


if __name__ == "__main__":
    main()
