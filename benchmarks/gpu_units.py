"""The units of benchmarks/gpu.py: their names, part by part, and what a worker does for each of them."""

from __future__ import annotations

import gc
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import VARIANTS, check_step, largest_batch, time_model
from gpu_nodes import NODES, RAGGED, Node, check_node, time_node
from gpu_sweeps import check_sweeps

import bnrestructure
from bnrestructure.bench.ceilings import copy_bandwidth, fma_ceiling
from bnrestructure.kernels import cuda

__all__ = ["PARTS", "Part", "release_memory", "run_unit", "units"]

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu(0.1)")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODELS = ("densenet121", "resnet50", "mobilenet_v2", "efficientnet_b0")
_JOIN = next(node for node in NODES if node.joined)
#: Where a node is checked at the tile it is timed with: the tile's size depends on the number of pixels.
_CHECKED_BATCH = 128


@dataclass(frozen=True)
class Part:
    """Units that may run side by side (``workers``) or must be alone, as what they take is timed; ``seconds`` for each at most."""

    name: str
    workers: int
    seconds: float
    requires: tuple[str, ...] = ()


#: In the order of what a run that is cut short should have done.
PARTS = (
    Part("environment", 1, 120),
    Part("ceilings", 1, 60, ("environment",)),
    Part("check", 10, 150, ("environment",)),
    Part("steps", 4, 200, ("environment",)),
    Part("warm", 4, 200, ("environment",)),
    Part("models", 1, 150, ("steps",)),
    Part("kernels", 1, 60, ("ceilings", "check")),
    Part("models of batch 64", 1, 150, ("steps",)),
    Part("largest batch", 1, 150, ("steps",)),
)


def units(part: str, dry: bool) -> list[str]:
    """The names of a part's units."""
    nodes = _nodes(dry)
    models = ("tiny",) if dry else MODELS
    match part:
        case "check":
            dtypes = ["bfloat16"] if dry else list(DTYPES)
            sweeps = ACTIVATIONS[1:2] if dry else ACTIVATIONS
            return [f"{dtype} {name}" for dtype in dtypes for name in (*nodes, *(f"sweeps {act}" for act in sweeps))]
        case "kernels":
            return [name for name in nodes if dry or name not in {node.name for node in RAGGED}]
        case "steps":
            return list(models)
        case "warm":
            return [f"{name} {variant}" for variant in ("restructured", "compile", "compile graphed") for name in models]
        case "models" | "models of batch 64":
            return [f"{name} {variant}" for name in models for variant in VARIANTS]
        case "largest batch":
            return [f"{models[0]} {variant}" for variant in ("eager", "restructured")]
        case _:
            return [part]


def _nodes(dry: bool) -> dict[str, Node]:
    if not dry:
        return {node.name: node for node in (*NODES, *RAGGED)}
    small = [replace(node, name=f"small {node.name}", channels=4, out=4, size=5) for node in (NODES[0], NODES[3], _JOIN)]
    return {node.name: node for node in small}


def run_unit(request: dict[str, Any]) -> dict[str, Any]:
    """The result of one unit: ``ok`` and what was found. Raises whatever goes wrong."""
    part, name, dry = request["part"], request["name"], request["dry"]
    device = "cpu" if dry else "cuda"
    first, _, rest = name.partition(" ")
    match part:
        case "environment":
            return {"ok": True, **_environment(dry)}
        case "ceilings":
            return {"ok": True, "bytes": copy_bandwidth(device), "flops": fma_ceiling(device, torch.bfloat16)}
        case "check":
            if rest.startswith("sweeps "):
                return check_sweeps(rest.partition(" ")[2], DTYPES[first], device)
            node, timed = _nodes(dry)[rest], not dry and first == "bfloat16" and rest in {n.name for n in NODES}
            return check_node(node, DTYPES[first], device, batch=_CHECKED_BATCH if timed else 4 if not dry else 2)
        case "kernels":
            return time_node(_nodes(dry)[name], request["ceilings"], 2 if dry else 256, device)
        case "steps":
            return check_step(first, device, *((2, 16) if dry else ()))
        case "warm":
            # Compiles what the models' parts will run, side by side: Triton and Inductor keep it on disk.
            # The batch is the timed one for Inductor; for our kernels a smaller one gives nearly all the same tiles.
            batch = 2 if dry else 64 if rest == "restructured" else 256
            found = time_model(first, batch, rest, rounds=1, device=device, choices=_choices())
            return {"ok": True, "warmed": found.get("step") is not None}
        case "models" | "models of batch 64":
            batch = 2 if dry else 256 if part == "models" else 64
            return time_model(first, batch, rest, rounds=1 if dry else 20, device=device, choices=_choices())
        case "largest batch":
            return largest_batch(first, rest, device, most=4 if dry else 2**14)
        case _:
            raise ValueError(f"there is no part {part!r}")


def release_memory() -> None:
    """Give what the last unit needed back to the GPU, which other workers may share."""
    gc.collect()
    torch.cuda.empty_cache()


def _choices() -> Path:
    """Where the tuned variants keep their measurements: not where a user's are."""
    return Path(tempfile.gettempdir()) / f"bnrestructure-gpu-benchmark-{os.getuid()}"


def _environment(dry: bool) -> dict[str, Any]:
    """What the results depend on; they are not continued on another device or with other versions. Raises without a GPU."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "bnrestructure": bnrestructure.__version__}
    if dry:
        return {"device": "none: a dry run in Triton's interpreter", **found}
    if (reason := cuda.unavailable_reason()) is not None:
        raise RuntimeError(reason)
    device = torch.cuda.get_device_properties(0)
    own = {"device": device.name, "memory": device.total_memory, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {**own, **found}
