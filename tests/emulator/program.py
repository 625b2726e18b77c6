"""Runs a program on blocks: which threads go on where, barriers, and the end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bnrestructure.kernels.cuda.machine_code.sass import Code, Instruction
from emulator.accesses import ACCESSES
from emulator.arithmetic import INTEGER, split
from emulator.block import Block
from emulator.products import PRODUCTS
from emulator.real import REAL
from emulator.state import Array, Fault, predicate, words

__all__ = ["Program"]

_NOTHING = ("NOP", "MEMBAR", "ERRBAR", "WARPSYNC", "BSSY", "BSYNC", "CCTL", "YIELD", "ACQBULK", "PREEXIT")
_WAYS = ("EXIT", "BRA", "CALL", "RET")  # a CALL.REL.NOINC is a jump: where a RET goes on stands in a register
_MOST_STEPS = 2_000_000


class Program:
    """A kernel's instructions, each as a function of a block."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self._guards = [None if i.guard in (None, "PT", "UPT") else predicate(i.guard) for i in code]
        self._steps = [_step(i) for i in code]
        self._targets = [code.target(i) for i in code]
        self._returns = [words(i.operands[0].split()[0]) if i.opcode == "RET" else None for i in code]
        self._at = {int(i.address, 16): i.index for i in code}
        #: A branch's own condition, besides its guard: BRA P0, `(.L_x_1).
        self._conditions = [predicate(split(i.operands)[1][0]) if i.opcode == "BRA" and split(i.operands)[1] else None for i in code]

    def run(self, block: Block) -> None:
        """From the first instruction until all threads have left. Raises Fault for what a device would not forgive."""
        groups: dict[int, Array | None] = {0: None}  # threads by where they are; None: all
        arrived: dict[int, Array] = {}
        left = np.zeros(block.state.threads, bool)
        for _ in range(_MOST_STEPS):
            if not groups:
                if arrived:
                    raise Fault("some threads wait at a barrier that the others never reach")
                self._check_end(block)
                return
            index = min(groups)  # who is behind goes on first, so that ways meet again
            mask = groups.pop(index)
            instruction = self.code.instructions[index]
            if instruction.opcode == "BAR":
                here = arrived.get(index, np.zeros(block.state.threads, bool))
                arrived[index] = here | (True if mask is None else mask)
                block.executed[index] += len(block.warps_of(mask))
                if (left | np.logical_or.reduce(list(arrived.values()))).all():
                    block.shared.barrier()
                    for at, who in arrived.items():
                        _join(groups, at + 1, who)
                    arrived = {}
                continue
            active = self._active(block, index, mask)
            if instruction.opcode in _WAYS:
                taken = np.ones(block.state.threads, bool) if active is None else active
                staying = (np.ones(block.state.threads, bool) if mask is None else mask) & ~taken
                block.executed[index] += len(block.warps_of(mask))
                if instruction.opcode == "EXIT":
                    left |= taken
                elif (read := self._returns[index]) is not None:
                    addresses = np.broadcast_to(read(block.state), taken.shape)
                    for address in np.unique(addresses[taken]):
                        _join(groups, self._at[int(address)], taken & (addresses == address))
                elif taken.any():
                    target = self._targets[index]
                    if target is None:
                        raise ValueError(f"not emulated: {instruction}")
                    _join(groups, target, taken)
                if staying.any():
                    _join(groups, index + 1, staying)
                continue
            if active is None or active.any():
                step = self._steps[index]
                if step is not None:
                    try:
                        step(block, active)
                    except Fault as fault:
                        raise Fault(f"{fault} ({instruction})") from None
            block.executed[index] += len(block.warps_of(mask))
            _join(groups, index + 1, mask)
        raise Fault(f"no end after {_MOST_STEPS} instructions")

    def _active(self, block: Block, index: int, mask: Array | None) -> Array | None:
        """The threads of the mask for which the instruction's guard holds; None: all."""
        guard, condition = self._guards[index], self._conditions[index]
        for read in (guard, condition):
            if read is not None:
                holds = read(block.state)
                mask = holds.copy() if mask is None else mask & holds
        return None if mask is None or mask.all() else mask

    @staticmethod
    def _check_end(block: Block) -> None:
        if block.products:
            raise Fault("the program ends while a product is under way")


def _join(groups: dict[int, Array | None], index: int, mask: Array | None) -> None:
    if index in groups:
        other = groups[index]
        mask = None if mask is None or other is None else mask | other
    groups[index] = None if mask is None or mask.all() else mask


def _step(instruction: Instruction) -> Callable[[Block, Array | None], None] | None:
    """What an instruction does, or None where that is nothing, or the program's own business."""
    opcode = instruction.opcode
    if opcode in _NOTHING or opcode in ("BAR", *_WAYS):
        return None
    if opcode in ACCESSES:
        return ACCESSES[opcode](instruction)
    if opcode in PRODUCTS:
        return PRODUCTS[opcode](instruction)
    if instruction.name == "UIADD3.64":
        opcode = "IADD64"
    for name in (opcode, opcode.removeprefix("U")):
        for known in (INTEGER, REAL):
            if name in known:
                run = known[name](instruction)
                return lambda block, mask: run(block.state, mask)
    raise ValueError(f"not emulated: {instruction}")
