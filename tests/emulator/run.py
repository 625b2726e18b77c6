"""Runs recorded launches (launch.py) by emulation, on CPU tensors: what a device would do with the same arguments."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnrestructure.kernels.cuda.compiled import disassembled
from bnrestructure.kernels.cuda.launch import Launch
from bnrestructure.kernels.cuda.machine_code.sass import parse
from bnrestructure.kernels.cuda.specialisation import Specialisation
from emulator.block import STACK, Block
from emulator.memory import GlobalMemory, Region, SharedMemory
from emulator.program import Program
from emulator.state import State

__all__ = ["Emulation", "emulate"]

#: Where a kernel's parameters begin in its constant bank.
_PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}


@dataclass
class Emulation:
    """A launch that was run: its blocks in the order in which they ran, and the tensors' memory with who touched what."""

    blocks: list[Block]
    regions: dict[int, Region]


@dataclass(frozen=True)
class _Ready:
    program: Program
    entry: str
    shared: int


_ready: dict[str, _Ready] = {}


def emulate(
    launch: Launch, part: int = 90, order: Callable[[int], list[int]] = lambda n: list(range(n)), counting: bool = False
) -> Emulation:
    """Compile ``launch`` for ``part`` and run its blocks one after another in ``order``; its CPU tensors are written to in place.

    Raises Fault for an access outside the tensors, a misaligned one, or one that comes too early.
    """
    special = Specialisation.of(launch, part)
    if special.key not in _ready:
        compiled = special.compile()
        usage, text = disassembled(compiled.asm["cubin"])
        reserved = int(usage.partition("SHARED:")[2].split()[0])  # by the system, on sm_90: what a kernel asks for lies behind it
        _ready[special.key] = _Ready(Program(parse(text)), compiled.asm["ptx"], reserved + compiled.metadata.shared)
    ready = _ready[special.key]
    memory, regions = GlobalMemory(), {}
    for tensor in launch.arguments:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in regions:
            regions[tensor.untyped_storage().data_ptr()] = memory.add(_storage(tensor))
    constants = _constants(launch, special, ready, regions, part)
    grid = (*launch.grid, 1, 1)[:3]
    places = list(product(*(range(n) for n in reversed(grid))))
    blocks = []
    for number in order(len(places)):
        z, y, x = places[number]
        block = Block(State(special.warps, constants, (x, y, z)), memory, SharedMemory(max(ready.shared, 1), special.warps), counting)
        with np.errstate(all="ignore"):  # numbers wrap around, and NaN and infinities are numbers like others
            ready.program.run(block)
        blocks.append(block)
    return Emulation(blocks, regions)


def _storage(tensor: Tensor) -> np.ndarray:
    """All bytes of a tensor's storage, shared with it."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return np.asarray(whole.numpy())


def _constants(launch: Launch, special: Specialisation, ready: _Ready, regions: dict[int, Region], part: int) -> bytes:
    """The constant bank: the sizes of the grid and the parameters, as the kernel's entry in the PTX declares them."""
    bank = bytearray(_PARAMETERS[part])
    grid = (*launch.grid, 1, 1)[:3]
    struct.pack_into("<6I", bank, 0, 32 * special.warps, 1, 1, *grid)
    struct.pack_into("<I", bank, 0x28, STACK)
    given = _arguments(launch, special, regions)
    for kind in re.findall(r"\.param\s+\.(\w+)", ready.entry.partition(".entry")[2].partition(")")[0]):
        size, form = {"u64": (8, "Q"), "b64": (8, "Q"), "u32": (4, "I"), "b32": (4, "I"), "f32": (4, "f")}[kind]
        bank.extend(bytes(-len(bank) % size))
        value = next(given, 0)  # behind the kernel's own come pointers to scratch memory that none uses
        value = value if form == "f" else int(value) & (2 ** (8 * size) - 1)
        bank.extend(struct.pack("<f", value) if isinstance(value, float) else struct.pack(f"<{form}", value))
    return bytes(bank)


def _arguments(launch: Launch, special: Specialisation, regions: dict[int, Region]) -> Iterator[Any]:
    for name, value in zip(special.kernel.arg_names, launch.arguments, strict=False):
        if special.signature[name] == "constexpr":
            continue
        if isinstance(value, Tensor):
            region = regions[value.untyped_storage().data_ptr()]
            yield region.address + value.storage_offset() * value.element_size()
        else:
            yield value
