"""One worker of benchmarks/gpu: reads a unit a line from its standard input, runs it, writes its result as a line of JSON.

Anything that goes wrong is a result, {"ok": False, "error": ...}, with the traceback on standard error; then the process
ends, as CUDA may be of no more use to it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from benchmarks.checkout import make_importable
from benchmarks.gpu.results import to_json

__all__ = ["main"]


def _run(request: dict[str, Any]) -> dict[str, Any]:
    make_importable()  # a missing package is a result, too
    from benchmarks.gpu.kernels import release_memory
    from benchmarks.gpu.units import run_unit

    found = run_unit(request)
    release_memory()
    return found


def main() -> int:
    """Until the input ends, or something fails."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not come between the results
    for line in sys.stdin:
        try:
            result = _run(json.loads(line))
        except BaseException as error:  # a result must come, whatever it was: the parent waits for it
            traceback.print_exc()
            message = (str(error).strip().splitlines() or [""])[0]
            result = {"ok": False, "error": f"{type(error).__name__}: {message[:300]}"}
        results.write(to_json(result) + "\n")
        results.flush()
        if "error" in result:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
