"""What benchmarks/gpu runs, in which order: the parts, their units' names, and what must have passed before a unit is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.nodes import NODES, RAGGED, Node

__all__ = ["BATCHES", "DTYPES", "PARTS", "VARIANTS", "WARMED", "nodes", "proof_of", "schedule", "served_by", "swept_shapes", "units"]


ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu(0.1)")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODELS = ("densenet121", "resnet50", "mobilenet_v2", "efficientnet_b0")
#: Timed at the large batch alone, after what takes less long to compile.
LAST_MODEL = "densenet201"
#: What is timed against each other, eager first. "graphed" is a CUDA graph of the whole step, for "compile" the one that it makes
#: itself, of the model alone; "captured" is its model in a graph like ours; "repeated" is ``restructure(model, graphs="auto")``.
VARIANTS = (
    "eager", "eager graphed", "compile", "compile graphed", "compile captured",
    "restructured", "restructured repeated", "restructured graphed", "restructured tuned graphed",
)  # fmt: skip
#: The parts that time models, with the images of a step.
BATCHES = {"models": 256, "models of batch 64": 64}
#: The parts that compile what those time.
WARMED = {"warm": "models", "warm batch 64": "models of batch 64"}
#: What each unit of a warming part compiles for. The candidates that tuning measures are kernels of their own.
_SERVES = {
    "restructured": ("restructured", "restructured repeated", "restructured graphed"),
    "restructured tuned graphed": ("restructured tuned graphed",),
    "compile": ("compile", "compile captured"),
    "compile graphed": ("compile graphed",),
}
#: (act, channels, height and width) at which the kernels that are no convolution are checked and timed, too.
SWEPT = {f"sweeps {act} {c} {size}": (act, c, size) for act, c, size in (
    ("relu", 256, 56), ("relu", 64, 112), ("relu", 1024, 7), ("silu", 240, 28),
)}  # fmt: skip
_JOIN = next(node for node in NODES if node.joined)


@dataclass(frozen=True)
class Part:
    """Units that may run side by side (``workers``) or must be alone, as what they take is timed; ``seconds`` for each at most.

    ``kept`` is False for what the next run needs anew: it finds the results' file, but neither this process nor what was compiled.
    """

    workers: int
    seconds: float
    requires: tuple[str, ...] = ()
    kept: bool = True


PARTS = {
    "environment": Part(1, 120, kept=False),
    "ceilings": Part(1, 60, ("environment",)),
    "steps": Part(5, 300, ("environment",)),
    "warm": Part(4, 300, ("environment",), kept=False),
    "models": Part(1, 300, ("steps", "warm")),
    "check": Part(10, 200, ("environment",)),
    "kernels": Part(1, 100, ("ceilings", "check")),
    "warm batch 64": Part(4, 300, ("environment",), kept=False),
    "models of batch 64": Part(1, 300, ("steps", "warm batch 64")),
    "largest batch": Part(1, 300, ("steps",)),
}


def schedule(dry: bool) -> list[tuple[str, list[str]]]:
    """(part, names of units) in the order of what a run that is cut short should have done.

    A model is timed right after it was compiled: the compilers' caches may be gone in the next run.
    """
    models = ("tiny",) if dry else MODELS
    found = [("environment", ["environment"]), ("ceilings", ["ceilings"]), ("steps", [*models, *(() if dry else (LAST_MODEL,))])]
    for name in models:
        found += _timed("models", name)
    first, *others = ["bfloat16"] if dry else DTYPES
    shapes = list(nodes(dry))
    swept = list(swept_shapes(dry))
    sweeps = [f"sweeps {act}" for act in (ACTIVATIONS[1:2] if dry else ACTIVATIONS)]
    found.append(("check", [f"{first} {name}" for name in (*shapes, *sweeps, *swept)]))
    found.append(("kernels", [*(name for name in shapes if dry or name not in {node.name for node in RAGGED}), *swept]))
    if others:
        found.append(("check", [f"{dtype} {name}" for dtype in others for name in (*shapes, *sweeps)]))
    if not dry:
        found += _timed("models", LAST_MODEL)
    for name in models:
        found += _timed("models of batch 64", name)
    found.append(("largest batch", [f"{models[0]} {variant}" for variant in ("eager", "restructured")]))
    return found


def _timed(part: str, model: str) -> list[tuple[str, list[str]]]:
    """What compiles the variants of a model; then eager, whose losses the others' are compared with; then the others."""
    warming = next(warm for warm, timed in WARMED.items() if timed == part)
    first, *others = (f"{model} {variant}" for variant in VARIANTS)
    return [(warming, [f"{model} {variant}" for variant in _SERVES]), (part, [first]), (part, others)]


def units(part: str, dry: bool) -> list[str]:
    """The names of a part's units."""
    return [name for of, names in schedule(dry) if of == part for name in names]


def served_by(part: str, name: str) -> list[tuple[str, str]]:
    """The (part, unit) that a warming unit compiles for."""
    model, _, variant = name.partition(" ")
    return [(WARMED[part], f"{model} {timed}") for timed in _SERVES[variant]]


def proof_of(part: str, name: str) -> list[tuple[str, str]]:
    """The (part, unit) without which this unit gets no time: those that find its numbers right, and what its time is compared with."""
    if part == "kernels":
        return [("ceilings", "ceilings"), ("check", f"bfloat16 {name}")]
    if part in (*BATCHES, "largest batch") and "restructured" in name:
        return [("steps", name.partition(" ")[0])]
    return []


def nodes(dry: bool) -> dict[str, Node]:
    """The convolutions by name; tiny ones for a dry run."""
    if not dry:
        return {node.name: node for node in (*NODES, *RAGGED)}
    small = [replace(node, name=f"small {node.name}", channels=4, out=4, size=5) for node in (NODES[0], NODES[3], _JOIN)]
    return {node.name: node for node in small}


def swept_shapes(dry: bool) -> dict[str, tuple[str, int, int]]:
    """``SWEPT``; a tiny one for a dry run."""
    return {"sweeps relu 4 5": ("relu", 4, 5)} if dry else SWEPT
