"""Disassembled machine code (the text of ``nvdisasm -c``) as instructions with their operands, and the ways from each to the next."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["Code", "Instruction", "parse"]

_LABEL = re.compile(r"\s*(\.L_x_\d+|\$?\w[\w$.]*):\s*$")
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:\d|T))\s+)?([A-Z]\S*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([^)]+)\)")

#: After these the next instruction is never reached.
_ENDS = ("EXIT", "BRA", "CALL", "RET", "JMP", "BRX")


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@P0 LDG.E.128 R4, desc[UR4][R2.64]`` has guard P0, opcode LDG, and modifiers (E, 128)."""

    index: int
    address: str
    guard: str | None
    name: str
    operands: tuple[str, ...]

    @cached_property
    def opcode(self) -> str:
        """The name without its modifiers."""
        return self.name.partition(".")[0]

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        """What follows the opcode's dots."""
        return tuple(self.name.split(".")[1:])

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address}: {guard}{self.name} {', '.join(self.operands)}".rstrip()


@dataclass(frozen=True)
class Code:
    """A kernel's instructions and where its labels stand."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def target(self, instruction: Instruction) -> int | None:
        """The index that a branch goes to, or None for what is no branch with a label."""
        if instruction.opcode not in ("BRA", "JMP", "CALL"):
            return None
        found = _TARGET.search(", ".join(instruction.operands))
        return self.labels.get(found[1]) if found else None

    def successors(self, index: int) -> tuple[int, ...]:
        """Indices of the instructions that may come next. CALL.REL.NOINC is a branch, too: Triton's kernels have no functions."""
        instruction = self.instructions[index]
        after = (index + 1,) if index + 1 < len(self.instructions) else ()
        target = self.target(instruction)
        asks = any(o.startswith(("P", "UP", "!P", "!UP")) for o in instruction.operands[:-1])
        always = instruction.guard in (None, "PT", "UPT") and not asks
        if instruction.opcode not in _ENDS:
            return after
        found = () if target is None else (target,)
        return found if always else (*after, *found)

    @cached_property
    def loops(self) -> tuple[tuple[int, int], ...]:
        """(first, last) of each loop, by the branch that goes back. The branch to itself that ends every kernel is none."""
        back = ((self.target(i), i.index) for i in self.instructions)
        return tuple((first, last) for first, last in back if first is not None and first < last)

    @cached_property
    def main_loop(self) -> tuple[int, int] | None:
        """The longest loop."""
        return max(self.loops, key=lambda loop: loop[1] - loop[0], default=None)

    @cached_property
    def end(self) -> int:
        """The index after the last EXIT: what follows is padding."""
        return max((i.index for i in self.instructions if i.opcode == "EXIT"), default=len(self.instructions) - 1) + 1


def parse(text: str) -> Code:
    """The instructions of a disassembly with one kernel. Raises ValueError where there are none."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            address, guard, name, operands = found.groups()
            instructions.append(Instruction(len(instructions), address, guard, name, _split(operands)))
    if not instructions:
        raise ValueError("no instructions in this disassembly")
    return Code(tuple(instructions), labels)


def _split(operands: str) -> tuple[str, ...]:
    """Operands at the commas; none stands inside brackets."""
    return tuple(part.strip() for part in operands.split(",")) if operands else ()
