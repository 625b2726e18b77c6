"""The least time that each launch of a step can take on an H100, from counts: what is issued, shuffled, multiplied and moved.

A launch takes at least what the whole device needs for its instructions, for its passes over shared memory and its shuffles, for its
products, and for the bytes of its tensors, each once. And it takes at least what its programs need one after another where few of them
fit a multiprocessor: prologue, loop and epilogue of one program overlap only with those of another. Nothing here was timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.cuda_code.counts import Counts, count
from benchmarks.cuda_code.record import Product, Step
from bnrestructure.kernels.cuda.launch import Launch
from bnrestructure.kernels.cuda.specialisation import Specialisation

__all__ = ["Floor", "floors", "of_products", "small_launches"]

#: An H100: multiprocessors, clock in Hz, bytes a second, and operations a second that a product reaches.
MULTIPROCESSORS, CLOCK, BANDWIDTH, PRODUCTS = 132, 1.7e9, 2.9e12, 700e12
#: Seconds between two kernels of a graph that follow one another.
GAP = 1.5e-6
#: Kernels of a channel's vectors, whose time is the gap alone.
_SMALL = ("merge_kernel", "finalize_kernel", "finalize_backward_kernel", "sums_kernel")


@dataclass(frozen=True)
class Floor:
    """Seconds of one launch by what bounds it; ``serial``: its programs' phases one after another, as many at once as fit."""

    kernel: str
    what: str
    direction: str
    issue: float
    shared: float
    products: float
    memory: float
    serial: float
    counts: Counts

    @property
    def time(self) -> float:
        """The largest of them."""
        return max(self.issue, self.shared, self.products, self.memory, self.serial)

    @property
    def bound(self) -> str:
        """Which one that is."""
        return max(("issue", "shared", "products", "memory", "serial"), key=lambda name: getattr(self, name))


def floors(step: Step, cache: Path) -> Iterator[Floor]:
    """Of each launch that reads or writes an activation."""
    for number, launch in enumerate(step.launches):
        special = Specialisation.of(launch, 90)
        if special.name not in _SMALL:
            yield _floor(launch, special, count(special, cache), "forward" if number < step.forward else "backward")


def small_launches(step: Step) -> int:
    """How many others there are: of vectors, and PyTorch's own but for convolutions."""
    own = sum(launch.kernel.__name__.strip("_") in _SMALL for launch in step.launches)
    return own + sum(n for name, n in step.operations.items() if not name.startswith("convolution"))


def of_products(products: list[Product]) -> float:
    """Seconds of PyTorch's convolutions."""
    return sum(max(p.moved / BANDWIDTH, p.operations / PRODUCTS) for p in products)


def _floor(launch: Launch, special: Specialisation, counts: Counts, direction: str) -> Floor:
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    programs, turns = math.prod(launch.grid), _turns(special.name, launch, arguments, counts)
    phases = ((counts.prologue, 1), (counts.loop, turns), (counts.epilogue, 1))
    issue = sum(phase.issued * times for phase, times in phases) * counts.warps / 4
    shared = sum(phase.shared * times for phase, times in phases) * counts.warps
    moved = sum(t.numel() * t.element_size() for t in arguments.values() if isinstance(t, Tensor))
    if launch.constants.get("ACCUMULATE"):
        moved += arguments["dx_ptr"].numel() * arguments["dx_ptr"].element_size()
    operations = _operations(special.name, launch, arguments)
    of_one = MULTIPROCESSORS / programs  # a program's part of the device's rates
    moving, multiplying = moved / BANDWIDTH * of_one, operations / PRODUCTS * of_one
    # One program alone: its loads and products run under its own instructions, loop by loop; before and behind the loop nothing does.
    alone = sum(max(phase.issued / 4, phase.shared) * times * counts.warps for phase, times in phases if phase is not counts.loop) / CLOCK
    looping = max(max(counts.loop.issued / 4, counts.loop.shared) * turns * counts.warps / CLOCK, moving, multiplying)
    waves = programs / MULTIPROCESSORS
    return Floor(
        special.name, _shape(special, arguments), direction, issue * waves / CLOCK, shared * waves / CLOCK, operations / PRODUCTS,
        moved / BANDWIDTH, (alone + looping) * max(1.0, waves / counts.resident), counts,
    )  # fmt: skip


def _turns(kernel: str, launch: Launch, arguments: dict[str, Any], counts: Counts) -> int:
    """How often the longest loop is run through."""
    constants = launch.constants
    if kernel == "dense_forward_kernel":
        taps, depth = constants["KH"] * constants["KW"], arguments["group_inputs"]
        return math.ceil(depth * taps / constants["BK"]) if constants["GATHERED"] else taps * math.ceil(depth / constants["BK"])
    if kernel == "dense_dgrad_kernel":
        return arguments["taps_h"] * arguments["taps_w"] * math.ceil(arguments["group_outputs"] / constants["BK"])
    if "steps" in arguments:
        return int(arguments["steps"])
    if kernel == "squeeze_kernel":
        return math.ceil(arguments["positions"] / constants["BR"])
    if "KH" in constants:
        return int(constants["KH"]) if counts.loop.issued else 0
    return 1 if counts.loop.issued else 0


def _operations(kernel: str, launch: Launch, arguments: dict[str, Any]) -> int:
    """Multiplications and additions on tensor cores."""
    constants = launch.constants
    if kernel == "dense_dgrad_kernel":
        return 2 * arguments["rows"] * arguments["inputs"] * arguments["group_outputs"] * arguments["taps_h"] * arguments["taps_w"]
    if kernel.startswith("dense"):
        return 2 * arguments["rows"] * arguments["outputs"] * arguments["group_inputs"] * constants["KH"] * constants["KW"]
    return 0


def _shape(special: Specialisation, arguments: dict[str, Any]) -> str:
    """The largest tensor's shape, the kernel's size and the tile."""
    largest = max((t for t in arguments.values() if isinstance(t, Tensor)), key=lambda t: t.numel())
    size = "x".join(str(special.constants[name]) for name in ("KH", "KW") if name in special.constants)
    channels = "->".join(str(arguments[name]) for name in ("inputs", "outputs") if name in arguments)
    return f"{'x'.join(map(str, largest.shape))} {channels} {size} tile {special.tile}, {special.warps} warps".replace("  ", " ")
