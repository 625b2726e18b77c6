"""Floating-point instructions and conversions, in fp32 with one rounding each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bnrestructure.kernels.cuda.emulator.arithmetic import Run, combined, split
from bnrestructure.kernels.cuda.emulator.state import Array, State, floats, predicate, store, store_predicate, wide, words
from bnrestructure.kernels.cuda.machine_code.sass import Instruction

__all__ = ["REAL", "from_bf16", "to_bf16"]

_ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip


def to_bf16(x: Array) -> Array:
    """fp32 to the bits of bf16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    result = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), result)


def from_bf16(bits: Array) -> Array:
    """The bits of bf16 as fp32."""
    return (np.asarray(bits, dtype=np.uint32) << np.uint32(16)).view(np.float32)


def _bits(x: Any) -> Array:
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


def _elementwise(function: Callable[..., Any], count: int) -> Callable[[Instruction], Run]:
    def build(instruction: Instruction) -> Run:
        registers, _ = split(instruction.operands)
        write, reads = store(registers[0]), [floats(text) for text in registers[1 : count + 1]]
        return lambda state, mask: write(state, _bits(function(*(read(state) for read in reads))), mask)

    return build


def _fma(a: Any, b: Any, c: Any) -> Any:
    return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)).astype(np.float32)


def _fsel(instruction: Instruction) -> Run:
    registers, flags = split(instruction.operands)
    write, a, b, choose = store(registers[0]), floats(registers[1]), floats(registers[2]), predicate(flags[-1])

    def run(state: State, mask: Array | None) -> None:
        write(state, np.where(choose(state), _bits(a(state)), _bits(b(state))), mask)

    return run


def _fmnmx(instruction: Instruction) -> Run:
    registers, flags = split(instruction.operands)
    write, a, b, smaller = store(registers[0]), floats(registers[1]), floats(registers[2]), predicate(flags[-1])
    keeps_nan = "NAN" in instruction.modifiers

    def run(state: State, mask: Array | None) -> None:
        x, y = a(state), b(state)
        low, high = (np.minimum, np.maximum) if keeps_nan else (np.fmin, np.fmax)
        write(state, _bits(np.where(smaller(state), low(x, y), high(x, y))), mask)

    return run


def _fsetp(instruction: Instruction) -> Run:
    registers, flags = split(instruction.operands)
    name, join = instruction.modifiers[0], combined(instruction.name)
    first, second, last = store_predicate(flags[0]), store_predicate(flags[1]), predicate(flags[-1])
    a, b = floats(registers[0]), floats(registers[1])

    def run(state: State, mask: Array | None) -> None:
        x, y = np.broadcast_arrays(a(state), b(state), state.lane.astype(np.float32))[:2]
        unordered = np.isnan(x) | np.isnan(y)
        if name in ("NAN", "NUM"):
            found = unordered if name == "NAN" else ~unordered
        elif name.endswith("U") and name[:2] in _ORDERED:  # true where they cannot be compared
            found = _ORDERED[name[:2]](x, y) | unordered
        else:
            found = _ORDERED[name](x, y) & ~unordered
        other = last(state).copy()
        first(state, join(found, other), mask)
        second(state, join(~found, other), mask)

    return run


def _reciprocal_root(x: Any) -> Any:
    return (1.0 / np.sqrt(np.asarray(x, np.float64))).astype(np.float32)


_UNARY: dict[str, Callable[[Any], Any]] = {
    "RCP": lambda x: (1.0 / np.asarray(x, np.float64)).astype(np.float32), "EX2": np.exp2, "LG2": np.log2, "SQRT": np.sqrt,
    "RSQ": _reciprocal_root, "TANH": np.tanh,
}  # fmt: skip


def _mufu(instruction: Instruction) -> Run:
    return _elementwise(_UNARY[instruction.modifiers[0]], 1)(instruction)


def _pack(instruction: Instruction) -> Run:
    """F2FP.BF16.F32.PACK_AB d, a, b: a above b, as bf16 or (F16) fp16; RELU: not below zero."""
    d, a, b = split(instruction.operands)[0][:3]
    write, high, low = store(d), floats(a), floats(b)
    narrow, relu = "BF16" in instruction.modifiers, "RELU" in instruction.modifiers

    def half(x: Any) -> Array:
        x = np.maximum(x, np.float32(0)) if relu else x
        return to_bf16(x) if narrow else np.asarray(x, np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)

    def run(state: State, mask: Array | None) -> None:
        write(state, (half(high(state)) << np.uint32(16)) | half(low(state)), mask)

    return run


def _half(text: str) -> Callable[[State], Any]:
    """One half of a register as fp32: R4.H1_H1; a number stands for itself."""
    found = re.fullmatch(r"(-?)(U?R(?:\d+|Z))\.H([01])_H[01]", text.replace(".reuse", ""))
    if found is None:
        return floats(text)
    read, shift = words(found[2]), np.uint32(16 * int(found[3]))

    def value_of(state: State) -> Any:
        value = ((np.asarray(read(state), np.uint32) >> shift) & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float32)
        return -value if found[1] else value

    return value_of


def _hadd2(instruction: Instruction) -> Run:
    """HADD2.F32 d, -RZ, R4.H0_H0: how fp16 becomes fp32."""
    d, a, b = split(instruction.operands)[0]
    if "F32" not in instruction.modifiers:
        raise ValueError(f"not emulated: {instruction}")
    write, left, right = store(d), floats(a), _half(b)
    return lambda state, mask: write(state, _bits(left(state) + right(state)), mask)


def _hfma2(instruction: Instruction) -> Run:
    """HFMA2 d, -RZ, RZ, x, y: how a constant of two halves is made; nothing else is needed."""
    d, a, b, *halves = split(instruction.operands)[0]
    if (a.strip("-"), b.strip("-")) != ("RZ", "RZ") or len(halves) != 2:
        raise ValueError(f"not emulated: {instruction}")
    high, low = (np.float16(float(text)).view(np.uint16) for text in halves)
    write, value = store(d), np.asarray(int(high) << 16 | int(low), dtype=np.uint32)
    return lambda state, mask: write(state, value, mask)


def _integer_to_float(instruction: Instruction) -> Run:
    registers, _ = split(instruction.operands)
    write, modifiers = store(registers[0]), instruction.modifiers
    signed = not any(m in ("U32", "U64") for m in modifiers)
    long = any(m in ("S64", "U64") for m in modifiers)
    read = wide(registers[1], signed) if long else words(registers[1])

    def run(state: State, mask: Array | None) -> None:
        value = np.asarray(read(state))
        value = (value.view(np.int32) if signed and not long else value).astype(np.float64)
        result = value.astype(np.float32)
        if "RP" in modifiers:  # towards plus infinity
            result = np.where(result.astype(np.float64) < value, np.nextafter(result, np.float32(np.inf)), result)
        write(state, _bits(result), mask)

    return run


def _float_to_integer(instruction: Instruction) -> Run:
    registers, _ = split(instruction.operands)
    write, read, modifiers = store(registers[0]), floats(registers[1]), instruction.modifiers
    lowest, highest = (0, 2**32 - 1) if "U32" in modifiers else (-(2**31), 2**31 - 1)
    rounding = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}
    cut = next((f for m, f in rounding.items() if m in modifiers), np.rint)

    def run(state: State, mask: Array | None) -> None:
        value = np.nan_to_num(cut(np.asarray(read(state), np.float64)), nan=0.0)
        write(state, np.clip(value, lowest, highest).astype(np.int64).astype(np.uint32), mask)

    return run


def _narrowed(instruction: Instruction) -> Run:
    """F2F.BF16.F32 and F2F.F16.F32: one number into the low half."""
    d, a = split(instruction.operands)[0]
    write, read, narrow = store(d), floats(a), "BF16" in instruction.modifiers

    def run(state: State, mask: Array | None) -> None:
        x = np.asarray(read(state), np.float32)
        write(state, to_bf16(x) if narrow else x.astype(np.float16).view(np.uint16).astype(np.uint32), mask)

    return run


REAL: dict[str, Callable[[Instruction], Run]] = {
    "FADD": _elementwise(np.add, 2), "FMUL": _elementwise(np.multiply, 2), "FFMA": _elementwise(_fma, 3), "FSEL": _fsel, "FMNMX": _fmnmx,
    "FSETP": _fsetp, "MUFU": _mufu, "F2FP": _pack, "HADD2": _hadd2, "HFMA2": _hfma2, "I2F": _integer_to_float, "I2FP": _integer_to_float,
    "F2I": _float_to_integer, "F2F": _narrowed,
}  # fmt: skip
