"""Integer instructions, moves and predicates. Uniform ones (UIADD3) are the same on other registers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bnrestructure.kernels.cuda.emulator.state import Array, State, predicate, store, store_predicate, wide, words
from bnrestructure.kernels.cuda.machine_code.sass import Instruction

__all__ = ["INTEGER"]

Run = Callable[[State, Array | None], None]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip


def is_predicate(text: str) -> bool:
    """Whether an operand is a predicate."""
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


def split(operands: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(the registers and numbers, the predicates), each in order."""
    return [o for o in operands if not is_predicate(o)], [o for o in operands if is_predicate(o)]


def combined(name: str) -> Callable[[Any, Any], Any]:
    """How a comparison's result meets its last predicate: AND, OR or XOR among the modifiers."""
    return next(f for word, f in (("AND", np.logical_and), ("OR", np.logical_or), ("XOR", np.logical_xor)) if word in name.split("."))


def _signed(value: Any) -> Any:
    return np.asarray(value, dtype=np.uint32).view(np.int32)


def _long(value: Any, signed: bool) -> Any:
    """32 bits as 64."""
    return _signed(value).astype(np.int64) if signed else np.asarray(value, dtype=np.uint32).astype(np.uint64)


def _elementwise(function: Callable[..., Any], count: int) -> Callable[[Instruction], Run]:
    """``d = function(a, b, ...)`` of ``count`` words."""

    def build(instruction: Instruction) -> Run:
        registers, _ = split(instruction.operands)
        write, reads = store(registers[0]), [words(text) for text in registers[1 : count + 1]]
        return lambda state, mask: write(state, function(*(read(state) for read in reads)), mask)

    return build


def _iadd3(instruction: Instruction) -> Run:
    """d, carries = a + b + c (+ carries). A negated operand is its complement and one more, carried like the rest."""
    registers, flags = split(instruction.operands)
    extended = "X" in instruction.modifiers
    carried = flags[-2:] if extended else []
    outs = [store_predicate(p) for p in flags[: len(flags) - len(carried)]]
    write = store(registers[0])
    reads = [(words(text.lstrip("-")), text.startswith("-")) for text in registers[1:]]
    ins = [predicate(p) for p in carried]

    def run(state: State, mask: Array | None) -> None:
        total = np.zeros((), dtype=np.uint64)
        for read, negative in reads:
            value = np.asarray(read(state), dtype=np.uint32)
            total = total + ((~value).astype(np.uint64) + np.uint64(1) if negative else value.astype(np.uint64))
        for read in ins:
            total = total + read(state).astype(np.uint64)
        carry = np.broadcast_to(total >> np.uint64(32), state.lane.shape)
        write(state, (total & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)
        for i, out in enumerate(outs):
            out(state, carry > i, mask)

    return run


def _iadd64(instruction: Instruction) -> Run:
    registers, _ = split(instruction.operands)
    low, high = store(registers[0]), store(registers[0], 1)
    reads = [wide(text) for text in registers[1:]]

    def run(state: State, mask: Array | None) -> None:
        total = sum((read(state) for read in reads[1:]), start=reads[0](state))
        low(state, np.asarray(total).astype(np.uint32), mask)
        high(state, (np.asarray(total) >> np.uint64(32)).astype(np.uint32), mask)

    return run


def _imad(instruction: Instruction) -> Run:
    """d = a * b + c: the low word, the high one (HI) or both (WIDE); c is as wide as the product."""
    registers, flags = split(instruction.operands)
    signed = "U32" not in instruction.modifiers
    d, a, b, c = registers
    left, right, write = words(a), words(b), store(d)
    if "WIDE" in instruction.modifiers or "HI" in instruction.modifiers:
        added, high = wide(c, signed), store(d, 1)
        only_high = "HI" in instruction.modifiers

        def run(state: State, mask: Array | None) -> None:
            total = _long(left(state), signed) * _long(right(state), signed) + added(state)
            bits = np.asarray(total).view(np.uint64)
            upper = (bits >> np.uint64(32)).astype(np.uint32)
            if only_high:
                write(state, upper, mask)
            else:
                write(state, bits.astype(np.uint32), mask)
                high(state, upper, mask)

        return run
    third = words(c)
    carry = predicate(flags[-1]) if "X" in instruction.modifiers else None

    def plain(state: State, mask: Array | None) -> None:
        total = _long(left(state), False) * _long(right(state), False) + _long(third(state), False)
        if carry is not None:
            total = total + carry(state)
        write(state, np.asarray(total).astype(np.uint32), mask)

    return plain


def _lea(instruction: Instruction) -> Run:
    """d = (a << n) + b, or of the shifted pair the upper word (HI); SX32: the pair is a with its sign."""
    registers, flags = split(instruction.operands)
    high, extended, sign = ("HI" in instruction.modifiers, "X" in instruction.modifiers, "SX32" in instruction.modifiers)
    shift = int(registers[-1], 0)
    upper = words(registers[3]) if high and len(registers) > 4 else None
    write, a = store(registers[0]), words(registers[1])
    b, negative = words(registers[2].lstrip("-")), registers[2].startswith("-")
    carry = predicate(flags[-1]) if extended else None
    outs = [store_predicate(p) for p in flags if not extended or p is not flags[-1]]

    def run(state: State, mask: Array | None) -> None:
        value = _long(a(state), sign).astype(np.uint64)
        if upper is not None:
            value = value | (_long(upper(state), False) << np.uint64(32))
        value = value << np.uint64(shift)
        value = value >> np.uint64(32) if high else value & np.uint64(0xFFFFFFFF)
        other = np.asarray(b(state), dtype=np.uint32)
        total = value + ((~other).astype(np.uint64) + np.uint64(1) if negative else other.astype(np.uint64))
        if carry is not None:
            total = total + carry(state).astype(np.uint64)
        write(state, total.astype(np.uint32), mask)
        for out in outs:
            out(state, np.broadcast_to((total >> np.uint64(32)) > 0, state.lane.shape), mask)

    return run


def _shf(instruction: Instruction) -> Run:
    """Shifts of the pair {c, a}: to the right, or to the left, by b; the low word or the high one."""
    d, a, amount, c = split(instruction.operands)[0]
    right, high = instruction.modifiers[0] == "R", "HI" in instruction.modifiers
    signed = any(m in ("S32", "S64") for m in instruction.modifiers)
    single = any(m in ("U32", "S32") for m in instruction.modifiers)
    write, low, by, up = store(d), words(a), words(amount), words(c)

    def run(state: State, mask: Array | None) -> None:
        count = np.minimum(np.asarray(by(state), dtype=np.uint32), 63 if not single else 32).astype(np.uint64)
        if single and right and high:  # the high word alone
            value = _signed(up(state)).astype(np.int64) if signed else _long(up(state), False)
            result = value >> (count.astype(np.int64) if signed else count)
        elif single and not right and not high:
            result = _long(low(state), False) << count
        else:
            pair = _long(low(state), False) | (_long(up(state), False) << np.uint64(32))
            to_right = pair.view(np.int64) >> count.astype(np.int64) if signed else pair >> count
            result = to_right if right else pair << count
            result = np.asarray(result).view(np.uint64) >> np.uint64(32) if high else result
        write(state, np.asarray(result).astype(np.uint32), mask)

    return run


def table(lut: int, a: Any, b: Any, c: Any) -> Any:
    """Bitwise, the function of three bits whose truth table ``lut`` is."""
    result = a & ~a
    for i in range(8):
        if lut >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def _lop3(instruction: Instruction) -> Run:
    registers, flags = split(instruction.operands)
    lut = int(registers[-1], 16)
    write, reads = store(registers[0]), [words(text) for text in registers[1:4]]
    outs = [store_predicate(p) for p in flags[:-1]]

    def run(state: State, mask: Array | None) -> None:
        result = table(lut, *(np.asarray(read(state), dtype=np.uint32) for read in reads))
        write(state, result, mask)
        for out in outs:
            out(state, np.broadcast_to(result != 0, state.lane.shape), mask)

    return run


def _plop3(instruction: Instruction) -> Run:
    first, second, *sources = (o for o in instruction.operands if is_predicate(o))
    luts = [int(o, 16) for o in instruction.operands if not is_predicate(o)]
    outs, reads = [store_predicate(first), store_predicate(second)], [predicate(p) for p in sources]

    def run(state: State, mask: Array | None) -> None:
        values = [read(state).copy() for read in reads]
        for out, lut in zip(outs, luts, strict=True):
            out(state, table(lut, *values), mask)

    return run


def _isetp(instruction: Instruction) -> Run:
    registers, flags = split(instruction.operands)
    compare, join = _COMPARE[instruction.modifiers[0]], combined(instruction.name)
    signed, extended = "U32" not in instruction.modifiers, "EX" in instruction.modifiers
    first, second = store_predicate(flags[0]), store_predicate(flags[1])
    a, b = (words(text) for text in registers)
    last, low = (predicate(flags[-2]), predicate(flags[-1])) if extended else (predicate(flags[-1]), None)
    strict = _COMPARE[instruction.modifiers[0][0] + "T"] if extended and instruction.modifiers[0][0] in "LG" else compare

    def run(state: State, mask: Array | None) -> None:
        left, right = _long(a(state), signed), _long(b(state), signed)
        if low is None:
            found = compare(left, right)
        elif instruction.modifiers[0] == "NE":
            found = (left != right) | low(state)
        elif instruction.modifiers[0] == "EQ":
            found = (left == right) & low(state)
        else:
            found = strict(left, right) | ((left == right) & low(state))
        found = np.broadcast_to(found, state.lane.shape)
        other = last(state).copy()
        first(state, join(found, other), mask)
        second(state, join(~found, other), mask)

    return run


def _sel(instruction: Instruction) -> Run:
    registers, flags = split(instruction.operands)
    write, a, b, choose = store(registers[0]), words(registers[1]), words(registers[2]), predicate(flags[-1])
    return lambda state, mask: write(state, np.where(choose(state), a(state), b(state)), mask)


def _minmax(instruction: Instruction) -> Run:
    """VIMNMX and IMNMX of two; VIADDMNMX of a sum and a third. The predicate chooses the smaller."""
    registers, flags = split(instruction.operands)
    signed, adds = "U32" not in instruction.modifiers, "VIADDMNMX" in instruction.name
    write, smaller = store(registers[0]), predicate(flags[-1])
    reads = [words(text) for text in registers[1:]]

    def run(state: State, mask: Array | None) -> None:
        values = [np.asarray(read(state), dtype=np.uint32) for read in reads]
        if adds:
            values = [(values[0] + values[1]).astype(np.uint32), values[2]]
        a, b = (_long(value, signed) for value in values)
        result = np.where(smaller(state), np.minimum(a, b), np.maximum(a, b))
        write(state, result.astype(np.int64).astype(np.uint32) if signed else result.astype(np.uint32), mask)

    return run


def _prmt(instruction: Instruction) -> Run:
    d, a, selector, b = split(instruction.operands)[0]
    write, low, how, high = store(d), words(a), words(selector), words(b)

    def run(state: State, mask: Array | None) -> None:
        pair = _long(low(state), False) | (_long(high(state), False) << np.uint64(32))
        selectors = np.asarray(how(state), dtype=np.uint32)
        result = np.zeros((), dtype=np.uint64)
        for i in range(4):
            nibble = (selectors >> np.uint32(4 * i)) & np.uint32(15)
            byte = (pair >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            byte = np.where(nibble & 8, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            result = result | (byte << np.uint64(8 * i))
        write(state, np.broadcast_to(result, state.lane.shape).astype(np.uint32), mask)

    return run


def _sgxt(instruction: Instruction) -> Run:
    d, a, bits = split(instruction.operands)[0]
    write, value, count = store(d), words(a), int(bits, 0)
    signed = "U32" not in instruction.modifiers

    def run(state: State, mask: Array | None) -> None:
        kept = np.asarray(value(state), dtype=np.uint32) << np.uint32(32 - count)
        result = (kept.view(np.int32) >> np.int32(32 - count)).view(np.uint32) if signed else kept >> np.uint32(32 - count)
        write(state, result, mask)

    return run


def _predicates_as_word(instruction: Instruction) -> Run:
    """P2R d, PR, a, m: a with the bits of m from the predicates; .B1 and so on: in that byte."""
    registers = [o for o in instruction.operands if o != "PR"]
    at = next((8 * int(m[1]) for m in instruction.modifiers if re.fullmatch(r"B\d", m)), 0)
    write, base, taken = store(registers[0]), words(re.sub(r"\.B\d", "", registers[1])), int(registers[2], 16)
    found = re.search(r"\.B(\d)", registers[1])
    at = 8 * int(found[1]) if found else at

    def run(state: State, mask: Array | None) -> None:
        bits = sum((state.predicates[i].astype(np.uint32) << np.uint32(i) for i in range(7)), start=np.zeros(state.threads, np.uint32))
        old = np.asarray(base(state), dtype=np.uint32)
        write(state, (old & ~np.uint32(taken << at)) | ((bits & np.uint32(taken)) << np.uint32(at)), mask)

    return run


def _word_as_predicates(instruction: Instruction) -> Run:
    registers = [o for o in instruction.operands if o != "PR"]
    found = re.search(r"\.B(\d)", registers[0])
    at, value, taken = 8 * int(found[1]) if found else 0, words(re.sub(r"\.B\d", "", registers[0])), int(registers[1], 16)

    def run(state: State, mask: Array | None) -> None:
        bits = np.broadcast_to(np.asarray(value(state), dtype=np.uint32), state.lane.shape).copy()
        for i in range(7):
            if taken >> i & 1:
                store_predicate(f"P{i}")(state, (bits >> np.uint32(at + i) & np.uint32(1)) != 0, mask)

    return run


def _zero_pair(instruction: Instruction) -> Run:
    if instruction.operands[1] != "SRZ":
        raise ValueError(f"not emulated: {instruction}")
    writes = [store(instruction.operands[0], i) for i in range(1 if "32" in instruction.modifiers else 2)]

    def run(state: State, mask: Array | None) -> None:
        for write in writes:
            write(state, np.asarray(0, dtype=np.uint32), mask)

    return run


def _mov64(instruction: Instruction) -> Run:
    """ULDC.64, LDC.64, UMOV.64: two words."""
    d, a = instruction.operands[:2]
    count = 2 if "64" in instruction.modifiers else 4 if "128" in instruction.modifiers else 1
    pairs = [(store(d, i), words(a, i)) for i in range(count)]

    def run(state: State, mask: Array | None) -> None:
        values = [np.array(read(state)) for _, read in pairs]
        for (write, _), value in zip(pairs, values, strict=True):
            write(state, value, mask)

    return run


def _special(instruction: Instruction) -> Run:
    name = instruction.operands[1]
    write = store(instruction.operands[0])

    def run(state: State, mask: Array | None) -> None:
        axes = {f"SR_CTAID.{axis}": state.block[i] for i, axis in enumerate("XYZ")}
        known: dict[str, Any] = {**axes, "SR_TID.X": 32 * state.warp + state.lane, "SR_LANEID": state.lane, "SR_CgaCtaId": 0}
        known |= {"SR_TID.Y": 0, "SR_TID.Z": 0}
        write(state, np.asarray(known[name], dtype=np.uint32), mask)

    return run


def _to_uniform(instruction: Instruction) -> Run:
    """R2UR: of each warp the first thread's value."""
    write, read = store(instruction.operands[0]), words(instruction.operands[-1])

    def run(state: State, mask: Array | None) -> None:
        value = np.broadcast_to(np.asarray(read(state), dtype=np.uint32), state.lane.shape)
        write(state, np.repeat(value.reshape(-1, 32)[:, 0], 32), mask)

    return run


def _count_bits(a: Any) -> Any:
    return np.array([bin(int(v)).count("1") for v in np.atleast_1d(a)], dtype=np.uint32)


INTEGER: dict[str, Callable[[Instruction], Run]] = {
    "IADD3": _iadd3, "IADD": _iadd3, "IADD64": _iadd64, "IMAD": _imad, "LEA": _lea, "SHF": _shf, "LOP3": _lop3, "PLOP3": _plop3,
    "ISETP": _isetp, "SEL": _sel,
    "VIMNMX": _minmax, "IMNMX": _minmax, "VIADDMNMX": _minmax, "PRMT": _prmt, "SGXT": _sgxt, "P2R": _predicates_as_word,
    "R2P": _word_as_predicates, "CS2R": _zero_pair, "LDC": _mov64, "MOV": _mov64, "S2R": _special, "S2UR": _special, "R2UR": _to_uniform,
    "VIADD": _elementwise(lambda a, b: np.asarray(a, np.uint32) + np.asarray(b, np.uint32), 2),
    "IABS": _elementwise(lambda a: np.abs(_signed(a)).view(np.uint32), 1), "POPC": _elementwise(_count_bits, 1),
}  # fmt: skip
