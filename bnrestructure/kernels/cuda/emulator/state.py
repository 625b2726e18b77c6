"""The registers of a block's threads, and how an instruction's operands read and write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Array", "Fault", "State", "floats", "predicate", "store", "store_predicate", "wide", "words"]

Array = np.ndarray
#: Gives an array by thread, or a scalar of NumPy's for what is the same in all of them.
Read = Callable[["State"], Any]

#: Written to registers before the program: what is read without having been written is told by its absurdity.
_GARBAGE = 0x7FD5A5A5


class Fault(Exception):
    """A program does something that the hardware leaves undefined, or forbids."""


@dataclass
class State:
    """One block: [register, thread] of 32-bit words, predicates, and what identifies it.

    Uniform registers, of which a warp has one set, are kept by thread as well.
    """

    warps: int
    constants: bytes
    block: tuple[int, int, int]
    registers: Array = field(init=False)
    uniform: Array = field(init=False)
    predicates: Array = field(init=False)
    uniform_predicates: Array = field(init=False)
    warp: Array = field(init=False)
    lane: Array = field(init=False)

    def __post_init__(self) -> None:
        threads = 32 * self.warps
        self.registers = np.full((256, threads), _GARBAGE, dtype=np.uint32)
        self.uniform = np.full((256, threads), _GARBAGE, dtype=np.uint32)
        self.predicates = np.zeros((8, threads), dtype=bool)
        self.uniform_predicates = np.zeros((8, threads), dtype=bool)
        self.predicates[7] = self.uniform_predicates[7] = True
        self.warp, self.lane = np.divmod(np.arange(threads), 32)

    @property
    def threads(self) -> int:
        """How many threads the block has."""
        return 32 * self.warps


def predicate(text: str) -> Read:
    """P0, !P0, PT, UP0, !UPT as bool by thread."""
    negated, uniform = text.startswith("!"), "UP" in text
    number = text[-1]
    index = 7 if number == "T" else int(number)

    def read(state: State) -> Array:
        value: Array = (state.uniform_predicates if uniform else state.predicates)[index]
        return ~value if negated else value

    return read


def store_predicate(text: str) -> Callable[[State, Array, Array | None], None]:
    """Where a bool by thread goes, of the threads of a mask (None: all); PT takes none."""
    if text.endswith("T"):
        return lambda state, value, mask: None
    uniform, index = text.startswith("UP"), int(text[-1])

    def write(state: State, value: Array, mask: Array | None) -> None:
        where = (state.uniform_predicates if uniform else state.predicates)[index]
        np.copyto(where, value, where=True if mask is None else mask)

    return write


def store(text: str, offset: int = 0) -> Callable[[State, Any, Array | None], None]:
    """Where a word by thread goes: R4 (and ``offset`` registers on), UR4; RZ takes none."""
    if text in ("RZ", "URZ"):
        return lambda state, value, mask: None
    uniform, index = text.startswith("UR"), int(re.sub(r"\D", "", text)) + offset

    def write(state: State, value: Array, mask: Array | None) -> None:
        where = (state.uniform if uniform else state.registers)[index]
        np.copyto(where, value, where=True if mask is None else mask, casting="unsafe")

    return write


def _bare(text: str) -> tuple[str, str]:
    """(signs in front, the operand without them and without .reuse)."""
    text = text.replace(".reuse", "")
    signs = ""
    while text[0] in "-~!":
        signs, text = signs + text[0], text[1:]
    if text.startswith("|"):
        signs, text = signs + "|", text.strip("|")
    return signs, text


_ZERO = np.asarray(0, dtype=np.uint32)


def _base(text: str, offset: int = 0) -> Read:
    """A register, a word of the constant bank or a number, as words by thread (numbers and constants: scalars)."""
    if text in ("RZ", "URZ", "SRZ"):
        return lambda state: _ZERO
    if found := re.fullmatch(r"(U?R)(\d+)", text):
        uniform, index = found[1] == "UR", int(found[2]) + offset
        return lambda state: (state.uniform if uniform else state.registers)[index]
    if found := re.fullmatch(r"c\[0x0\]\[(?:(\w+)|R(\d+)\+?(0x\w+)?)\]", text):
        if found[1] is None:
            raise ValueError(f"a constant with an address at run time: {text}")
        at = int(found[1], 16) + 4 * offset
        return lambda state: np.asarray(int.from_bytes(state.constants[at : at + 4], "little"), dtype=np.uint32)
    if re.fullmatch(r"0x[0-9a-f]+|\d+", text):
        value = np.asarray(int(text, 0) & 0xFFFFFFFF if offset == 0 else 0, dtype=np.uint32)
        return lambda state: value
    raise ValueError(f"an operand that is not understood: {text}")


def words(text: str, offset: int = 0) -> Read:
    """An integer operand as uint32 by thread; -R4 is its two's complement, ~R4 its complement."""
    signs, bare = _bare(text)
    read = _base(bare, offset)
    if not signs:
        return read
    if signs == "~":
        return lambda state: ~read(state)
    if signs == "-":
        return lambda state: (np.uint32(0) - read(state)).astype(np.uint32)
    if signs == "|":
        return lambda state: np.abs(np.asarray(read(state)).view(np.int32)).view(np.uint32)
    raise ValueError(f"an operand that is not understood: {text}")


def wide(text: str, signed: bool = False) -> Read:
    """A pair of registers as int64 (uint64 unless ``signed``) by thread; numbers are extended by their sign."""
    signs, bare = _bare(text)
    if re.fullmatch(r"0x[0-9a-f]+|\d+", bare):
        number = int(bare, 0) * (-1 if signs == "-" else 1)
        value = np.asarray(np.int64(number) if signed else np.uint64(number & (2**64 - 1)))
        return lambda state: value
    low, high = _base(bare), _base(bare, 1)

    def read(state: State) -> Array:
        value = np.asarray(low(state), dtype=np.uint64) | (np.asarray(high(state), dtype=np.uint64) << np.uint64(32))
        if signs == "-":
            value = np.uint64(0) - value
        return value.view(np.int64) if signed else value

    return read


def floats(text: str) -> Read:
    """An fp32 operand by thread: registers, constants, and numbers as the disassembler writes them."""
    signs, bare = _bare(text)
    if re.fullmatch(r"\+?(INF|QNAN)|[\d.]+(e[+-]?\d+)?", bare):
        value = np.asarray(float(bare.replace("QNAN", "nan")) * (-1 if "-" in signs else 1), dtype=np.float32)
        return lambda state: value
    read = _base(bare)

    def value_of(state: State) -> Array:
        value = np.asarray(read(state), dtype=np.uint32).view(np.float32)
        if "|" in signs:
            value = np.abs(value)
        return -value if "-" in signs else value

    return value_of
