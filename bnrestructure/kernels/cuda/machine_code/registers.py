"""Which vector registers an instruction writes and which it reads."""

from __future__ import annotations

import re
from functools import lru_cache

from bnrestructure.kernels.cuda.machine_code.sass import Instruction

__all__ = ["accumulators", "left_operand", "read", "written"]

_REGISTER = re.compile(r"\bR(\d+)\b")
_PREDICATE = re.compile(r"!?U?P(\d|T)$")

#: Their first register operand, if any, is not written.
_NO_DESTINATION = frozenset({
    "ST", "STG", "STS", "STL", "STSM", "RED", "REDG", "LDGSTS", "LDGDEPBAR", "DEPBAR", "BAR", "BRA", "BRX", "EXIT", "RET", "NOP",
    "MEMBAR", "ERRBAR", "FENCE", "WARPGROUP", "WARPSYNC", "BSSY", "BSYNC", "BREAK", "ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3",
    "PSETP", "R2P", "R2UR", "CCTL", "SYNCS", "UBLKCP", "UTMALDG", "UTMASTG", "STTM", "ISETP3", "FCHK", "UTCBAR", "UTCHMMA",
    "UTCATOMSWS", "ELECT", "KILL", "YIELD", "NANOSLEEP", "CALL", "ACQBULK", "PREEXIT", "JMP", "VOTEU",
})  # fmt: skip
#: Registers that these write, whatever their modifiers say.
_WIDE = {"DADD": 2, "DMUL": 2, "DFMA": 2, "HMMA": 4, "IMMA": 4}


def _first(operand: str) -> int | None:
    """The number of the register that an operand begins with; None for RZ, constants, predicates and addresses."""
    found = re.match(r"[-|~!]*R(\d+)\b", operand)
    return int(found[1]) if found else None


@lru_cache(maxsize=65536)
def written(instruction: Instruction) -> frozenset[int]:
    """Numbers of the vector registers that are written; of an asynchronous product none, see :func:`accumulators`."""
    if instruction.opcode in _NO_DESTINATION or instruction.opcode == "HGMMA" or instruction.opcode.startswith("U"):
        return frozenset()
    for operand in instruction.operands:
        if _PREDICATE.match(operand):
            continue
        register = _first(operand)
        return frozenset() if register is None else frozenset(range(register, register + _width(instruction)))
    return frozenset()


def _width(instruction: Instruction) -> int:
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in _WIDE:
        return _WIDE[opcode]
    if opcode == "LDSM":
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if opcode == "LDTM":
        return next((int(m[1:]) for m in modifiers if re.fullmatch(r"x\d+", m)), 1)
    if opcode == "CS2R":
        return 1 if "32" in modifiers else 2
    if "128" in modifiers:
        return 4
    converted = opcode in ("F2I", "I2I", "F2F", "I2F") and modifiers[:1] in (("F64",), ("S64",), ("U64",))
    if "64" in modifiers or "WIDE" in modifiers or converted:
        return 2
    return 1


@lru_cache(maxsize=65536)
def read(instruction: Instruction) -> frozenset[int]:
    """Numbers of the vector registers that are named as sources, and of those that a wider access or product takes beside them."""
    operands = instruction.operands
    if written(instruction):
        first = next(i for i, operand in enumerate(operands) if not _PREDICATE.match(operand))
        operands = operands[first + 1 :]
    found = {int(number) for operand in operands for number in _REGISTER.findall(operand)}
    if instruction.opcode in ("STG", "STS", "STL", "ST"):
        width = 4 if "128" in instruction.modifiers else 2 if "64" in instruction.modifiers else 1
        value = _first(operands[-1])
        found |= set() if value is None else set(range(value, value + width))
    elif instruction.opcode == "STSM":
        value, count = _first(operands[-1]), instruction.modifiers[-1]
        found |= set() if value is None else set(range(value, value + (int(count) if count.isdigit() else 1)))
    elif instruction.opcode == "HMMA":
        for operand, width in zip(operands, (4, 2, 4), strict=False):
            value = _first(operand)
            found |= set() if value is None else set(range(value, value + width))
    return frozenset(found)


def accumulators(product: Instruction) -> frozenset[int]:
    """The registers in which an HGMMA adds up: of a 64 x n tile n / 2 in each thread, in fp32."""
    shape = re.fullmatch(r"64x(\d+)x\d+", product.modifiers[0])
    register = _first(product.operands[0])
    if shape is None or register is None:
        raise ValueError(f"an HGMMA of unknown form: {product}")
    return frozenset(range(register, register + int(shape[1]) // 2))


def left_operand(product: Instruction) -> frozenset[int]:
    """The registers from which an HGMMA takes its left operand: four, or none where that lies in shared memory."""
    register = _first(product.operands[1])
    return frozenset() if register is None else frozenset(range(register, register + 4))
