"""Registers of an asynchronous matrix product that are touched before the product is done.

An HGMMA (sm_90) whose left operand is in registers reads them after it was issued, until the WARPGROUP.DEPBAR that retires its group;
it writes its accumulators until then, too. Code that writes the former, or touches the latter, earlier than that gives wrong sums which
depend on timing. Triton 3.6 to 3.8 make such code where a product's operand was computed in registers and the product is pipelined
(triton-lang/triton#9433). Neither the interpreter nor a test on small shapes shows it.

All ways through the code are followed: a product is in flight at an instruction if it is on any way there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from bnrestructure.kernels.cuda.machine_code.registers import accumulators, left_operand, read, written
from bnrestructure.kernels.cuda.machine_code.sass import Code, Instruction

__all__ = ["Hazard", "hazards"]

#: Products in flight: by index the number of groups committed after their own; _OPEN while their own is not committed.
_Flight = Mapping[int, int]
_OPEN = -1
_MOST_GROUPS = 16


class Hazard(NamedTuple):
    """``instruction`` writes registers that ``product`` may still read, or touches what it may still write."""

    product: Instruction
    instruction: Instruction
    what: str

    def __str__(self) -> str:
        return f"{self.instruction} {self.what} of the product at {self.product.address}, which may be in flight"


def hazards(code: Code) -> list[Hazard]:
    """All of them, in the order of the code."""
    found = []
    for instruction, flight in zip(code, _flights(code), strict=True):
        if instruction.opcode == "HGMMA" or not flight:
            continue
        writes, reads = written(instruction), read(instruction)
        for index in sorted(flight):
            product = code.instructions[index]
            if writes & left_operand(product):
                found.append(Hazard(product, instruction, "writes to the left operand"))
            if (writes | reads) & accumulators(product):
                found.append(Hazard(product, instruction, "touches the accumulators"))
    return found


def _flights(code: Code) -> list[_Flight]:
    """What may be in flight before each instruction."""
    before: list[dict[int, int] | None] = [None] * len(code.instructions)
    before[0] = {}
    waiting = [0]
    while waiting:
        index = waiting.pop()
        after = _step(code.instructions[index], before[index] or {})
        for successor in code.successors(index):
            known = before[successor]
            merged = after if known is None else {p: min(known.get(p, _MOST_GROUPS), after.get(p, _MOST_GROUPS)) for p in known | after}
            if merged != known:
                before[successor] = dict(merged)
                waiting.append(successor)
    return [flight or {} for flight in before]


def _step(instruction: Instruction, flight: Mapping[int, int]) -> dict[int, int]:
    """What is in flight after the instruction."""
    if instruction.opcode == "HGMMA":
        flight = {**flight, instruction.index: _OPEN}
        if instruction.operands[-1] == "gsb0":
            flight = {product: min(age + 1, _MOST_GROUPS) for product, age in flight.items()}
    elif instruction.name == "WARPGROUP.DEPBAR.LE":
        allowed = re.fullmatch(r"0x([0-9a-f]+)", instruction.operands[1])
        if allowed is None:
            raise ValueError(f"a wait of unknown form: {instruction}")
        flight = {product: age for product, age in flight.items() if age < int(allowed[1], 16)}
    return dict(flight)
