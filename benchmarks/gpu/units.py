"""What a worker of benchmarks/gpu does for each unit of schedule.py."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import bnrestructure
from benchmarks.gpu.kernels import check_sweeps, time_node, time_sweeps
from benchmarks.gpu.models import check_step, largest_batch, time_model
from benchmarks.gpu.nodes import NODES, check_node
from benchmarks.gpu.schedule import BATCHES, DTYPES, WARMED, nodes, swept_shapes
from bnrestructure.bench.ceilings import copy_bandwidth, fma_ceiling
from bnrestructure.kernels.cuda import KERNELS

__all__ = ["run_unit"]


#: Where a node is checked at the tile it is timed with: the tile's size depends on the number of pixels.
_CHECKED_BATCH = 128


def run_unit(request: dict[str, Any]) -> dict[str, Any]:
    """The result of one unit: ``ok`` and what was found. Raises whatever goes wrong."""
    part, name, dry = request["part"], request["name"], request["dry"]
    device = "cpu" if dry else "cuda"
    first, _, rest = name.partition(" ")
    if part in WARMED:
        return _warm(first, rest, 2 if dry else BATCHES[WARMED[part]], device)
    if part in BATCHES:
        batch, rounds = (2, 1) if dry else (BATCHES[part], 5)
        return time_model(first, batch, rest, rounds, device, _choices(), request["losses"])
    match part:
        case "environment":
            return {"ok": True, **_environment(dry)}
        case "ceilings":
            return {"ok": True, "bytes": copy_bandwidth(device), "flops": fma_ceiling(device, torch.bfloat16)}
        case "check":
            if rest in swept_shapes(dry):
                act, channels, size = swept_shapes(dry)[rest]
                return check_sweeps(act, DTYPES[first], device, (2 if dry else 16, channels, size, size))
            if rest.startswith("sweeps "):
                return check_sweeps(rest.partition(" ")[2], DTYPES[first], device)
            node, timed = nodes(dry)[rest], not dry and first == "bfloat16" and rest in {n.name for n in NODES}
            return check_node(node, DTYPES[first], device, batch=_CHECKED_BATCH if timed else 4 if not dry else 2)
        case "kernels":
            batch = 2 if dry else 256
            if name in swept_shapes(dry):
                act, channels, size = swept_shapes(dry)[name]
                return time_sweeps(act, (batch, channels, size, size), request["ceilings"], device)
            return time_node(nodes(dry)[name], request["ceilings"], batch, device)
        case "steps":
            return check_step(first, device, *((2, 16) if dry else ()))
        case "largest batch":
            return largest_batch(first, rest, device, most=4 if dry else 2**14)
        case _:
            raise ValueError(f"there is no part {part!r}")


def _warm(model: str, variant: str, batch: int, device: str) -> dict[str, Any]:
    """Compiles what the parts after it will time, beside others: Triton and Inductor keep it on disk.

    Inductor compiles for one batch alone; for our kernels a smaller one gives nearly all the same tiles, and leaves the others memory.
    What is measured meanwhile, by the tuned variant, is worth nothing and is thrown away.
    """
    batch = min(batch, 64) if variant.startswith("restructured") else batch
    with tempfile.TemporaryDirectory() as choices:
        found = time_model(model, batch, variant, 0, device, Path(choices))
    return {"ok": False, "reason": found["reason"]} if "reason" in found else {"ok": True}


def _choices() -> Path:
    """Where the tuned variants keep their measurements: not where a user's are."""
    return Path(tempfile.gettempdir()) / f"bnrestructure-gpu-benchmark-{os.getuid()}"


def _environment(dry: bool) -> dict[str, Any]:
    """What the results depend on; they are not continued on another device or with other versions. Raises without a GPU."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "bnrestructure": bnrestructure.__version__}
    if dry:
        return {"device": "none: a dry run in Triton's interpreter", **found}
    if (reason := KERNELS.unavailable_reason()) is not None:
        raise RuntimeError(reason)
    device = torch.cuda.get_device_properties(0)
    own = {"device": device.name, "memory": device.total_memory, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {**own, **found}
