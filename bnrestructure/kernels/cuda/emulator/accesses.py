"""Loads, stores, copies to shared memory, and exchanges within a warp."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from bnrestructure.kernels.cuda.emulator.block import Block
from bnrestructure.kernels.cuda.emulator.state import Array, Fault, Read, predicate, store, store_predicate, words
from bnrestructure.kernels.cuda.machine_code.sass import Instruction

__all__ = ["ACCESSES", "address"]

Run = Callable[[Block, Array | None], None]


def address(text: str) -> Callable[[Block], Array]:
    """[R2+UR4+0x10], desc[UR4][R2.64+0x10]: bytes as uint64 by thread."""
    inside = re.fullmatch(r"(?:desc\[\w+\])?\[([^\]]*)\]", text)
    if inside is None:
        raise ValueError(f"an address that is not understood: {text}")
    pairs: list[tuple[Read, Read]] = []
    singles: list[tuple[Read, int]] = []
    offset = 0
    for part in re.findall(r"[+-]?[^+-]+", inside[1].replace(".reuse", "")):
        part = part.lstrip("+")
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", part):
            offset += int(part, 0)
        elif part.endswith((".64", ".U32")) or (part.startswith("UR") and pairs):
            name = part.partition(".")[0]
            pairs.append((words(name), words(name, 1) if not part.endswith(".U32") else words("RZ")))
        else:
            singles.append((words(re.sub(r"\.X\d+$", "", part)), int(part.rpartition(".X")[2]) if ".X" in part else 1))

    def value(block: Block) -> Array:
        total = np.full(block.state.threads, offset, np.int64)
        for low, high in pairs:
            total = total + (np.asarray(low(block.state)).astype(np.int64) | (np.asarray(high(block.state)).astype(np.int64) << 32))
        for read, factor in singles:
            total = total + np.asarray(read(block.state)).view(np.int32).astype(np.int64) * factor
        return total.view(np.uint64)

    return value


def size_of(instruction: Instruction) -> int:
    """Bytes that each thread moves."""
    for modifier in instruction.modifiers:
        if found := re.fullmatch(r"[US]?(8|16|64|128)", modifier):
            return int(found[1]) // 8
    return 4


def chosen(block: Block, mask: Array | None) -> Array:
    """The threads of a mask."""
    return np.arange(block.state.threads) if mask is None else np.flatnonzero(mask)


def _as_words(values: Array, signed: bool) -> Array:
    """[threads, bytes] as [words, threads]; what is narrower than a word is extended."""
    count, size = values.shape
    if size >= 4:
        return np.ascontiguousarray(values).view(np.uint32).reshape(count, -1).T
    narrow = np.ascontiguousarray(values).view(np.uint8 if size == 1 else np.uint16).reshape(1, count)
    return (narrow.view(np.int8 if size == 1 else np.int16).astype(np.int32).view(np.uint32)) if signed else narrow.astype(np.uint32)


def _load(instruction: Instruction) -> Run:
    registers = instruction.operands
    size, where = size_of(instruction), address(registers[1])
    writes = [store(registers[0], i) for i in range(max(1, size // 4))]
    shared, signed = instruction.opcode == "LDS", any(m in ("S8", "S16") for m in instruction.modifiers)

    def run(block: Block, mask: Array | None) -> None:
        who = chosen(block, mask)
        addresses = where(block)[who]
        if shared:
            found = block.shared.load(block.shared.positions(addresses, size), block.state.warp[who])
        else:
            found = block.memory.load(addresses, size)
        block.count_access(instruction, addresses, who, size)
        for write, value in zip(writes, _as_words(found, signed), strict=True):
            full = np.zeros(block.state.threads, np.uint32)
            full[who] = value
            write(block.state, full, mask)

    return run


def _store(instruction: Instruction) -> Run:
    where, source = address(instruction.operands[0]), instruction.operands[1]
    size, shared = size_of(instruction), instruction.opcode == "STS"
    reads = [words(source, i) for i in range(max(1, size // 4))]

    def run(block: Block, mask: Array | None) -> None:
        who = chosen(block, mask)
        addresses = where(block)[who]
        values = np.stack([np.broadcast_to(np.asarray(read(block.state)), (block.state.threads,))[who] for read in reads], axis=1)
        data = np.ascontiguousarray(values, dtype=np.uint32).view(np.uint8).reshape(len(who), -1)[:, :size]
        if shared:
            block.shared.store(block.shared.positions(addresses, size), data, block.state.warp[who])
        else:
            block.memory.store(addresses, data)
        block.count_access(instruction, addresses, who, size)

    return run


def _copy(instruction: Instruction) -> Run:
    """LDGSTS [shared], [global], P: zeros where P does not hold."""
    to, source = address(instruction.operands[0]), address(instruction.operands[1])
    size = size_of(instruction)
    really = predicate(instruction.operands[2]) if len(instruction.operands) > 2 else None

    def run(block: Block, mask: Array | None) -> None:
        who = chosen(block, mask)
        at = block.shared.positions(to(block)[who], size)
        reading = np.ones(len(who), bool) if really is None else really(block.state)[who]
        values = np.zeros((len(who), size), np.uint8)
        addresses = source(block)[who][reading]
        if len(addresses):
            values[reading] = block.memory.load(addresses, size)
        block.count_access(instruction, addresses, who[reading], size)
        block.begin_copy(at, values, block.state.warp[who])

    return run


def _commit(instruction: Instruction) -> Run:
    return lambda block, mask: block.commit_copies(block.warps_of(mask))


def _wait(instruction: Instruction) -> Run:
    """DEPBAR.LE SB0, n. Of other barriers than SB0 no copies hang."""
    if len(instruction.operands) < 2:
        return lambda block, mask: None
    allowed = int(instruction.operands[1], 16)
    return lambda block, mask: block.wait_for_copies(block.warps_of(mask), allowed)


def _shuffle(instruction: Instruction) -> Run:
    """SHFL.BFLY (and UP, DOWN, IDX) P, d, a, b, c among a warp's threads."""
    flag, d, a, b, c = instruction.operands
    kind, write, out = instruction.modifiers[0], store(d), store_predicate(flag)
    value, by, how = words(a), words(b), words(c)

    def run(block: Block, mask: Array | None) -> None:
        lane = block.state.lane
        amount = np.asarray(by(block.state), np.int64) & 31
        control = np.asarray(how(block.state), np.int64)
        segment, clamp = (control >> 8) & 31, control & 31
        lowest = lane & segment
        highest = lowest | (clamp & ~segment)
        source = {"BFLY": lane ^ amount, "UP": lane - amount, "DOWN": lane + amount, "IDX": lowest | (amount & ~segment)}[kind]
        inside = source >= highest if kind == "UP" else source <= highest
        taken = np.where(inside, source, lane) + 32 * block.state.warp
        if mask is not None and not mask[taken[mask]].all():
            raise Fault("a shuffle takes what an inactive thread holds")
        write(block.state, np.asarray(value(block.state), np.uint32)[taken], mask)
        out(block.state, inside, mask)

    return run


def _reduce(instruction: Instruction) -> Run:
    """REDUX.SUM.S32 UR4, R2: a warp's sum."""
    if instruction.modifiers[0] != "SUM":
        raise ValueError(f"not emulated: {instruction}")
    write, value = store(instruction.operands[0]), words(instruction.operands[1])

    def run(block: Block, mask: Array | None) -> None:
        values = np.broadcast_to(np.asarray(value(block.state), np.uint32), (block.state.threads,))
        values = values if mask is None else np.where(mask, values, np.uint32(0))
        write(block.state, np.repeat(values.reshape(-1, 32).sum(1, dtype=np.uint32), 32), None)

    return run


def _matrix_rows(block: Block, where: Callable[[Block], Array], count: int) -> Array:
    """[warps, count, 8, 16] positions of the rows of ``count`` matrices, whose addresses threads 0 to 8 * count - 1 of a warp hold."""
    addresses = where(block).reshape(-1, 32)[:, : 8 * count]
    rows: Array = block.shared.positions(addresses.reshape(-1), 16).reshape(len(addresses), count, 8, 16)
    return rows


def _matrices(instruction: Instruction) -> int:
    return int(instruction.modifiers[-1]) if instruction.modifiers[-1] in ("2", "4") else 1


def _load_matrices(instruction: Instruction) -> Run:
    """LDSM.16.M88.4: each thread gets two neighbours of a row of each 8 x 8 matrix; MT88: of a column."""
    count, transposed, where = _matrices(instruction), "MT88" in instruction.modifiers, address(instruction.operands[1])
    writes = [store(instruction.operands[0], i) for i in range(count)]

    def run(block: Block, mask: Array | None) -> None:
        at = _matrix_rows(block, where, count)
        warps = np.repeat(np.arange(block.state.warps), count * 8)
        values = block.shared.load(at.reshape(-1, 16), warps).reshape(at.shape)
        halves = np.ascontiguousarray(values).view(np.uint16).astype(np.uint32)  # [warps, count, 8, 8]
        halves = halves.swapaxes(2, 3) if transposed else halves
        block.count_access(instruction, where(block).reshape(-1, 32)[:, : 8 * count].reshape(-1), np.arange(len(warps)), 16)
        for i, write in enumerate(writes):
            pairs = halves[:, i].reshape(block.state.warps, 32, 2)
            write(block.state, (pairs[..., 0] | pairs[..., 1] << np.uint32(16)).reshape(-1), mask)

    return run


def _store_matrices(instruction: Instruction) -> Run:
    count, transposed, where = _matrices(instruction), "MT88" in instruction.modifiers, address(instruction.operands[0])
    reads = [words(instruction.operands[1], i) for i in range(count)]

    def run(block: Block, mask: Array | None) -> None:
        at = _matrix_rows(block, where, count)
        halves = np.empty((block.state.warps, count, 8, 8), np.uint16)
        for i, read in enumerate(reads):
            value = np.asarray(read(block.state), np.uint32)
            pairs = np.stack([value & np.uint32(0xFFFF), value >> np.uint32(16)], axis=-1).reshape(block.state.warps, 8, 8)
            halves[:, i] = pairs.swapaxes(1, 2) if transposed else pairs
        warps = np.repeat(np.arange(block.state.warps), count * 8)
        block.shared.store(at.reshape(-1, 16), np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 16), warps)
        block.count_access(instruction, where(block).reshape(-1, 32)[:, : 8 * count].reshape(-1), np.arange(len(warps)), 16)

    return run


def _fence(instruction: Instruction) -> Run:
    return lambda block, mask: block.shared.fence(block.warps_of(mask))


def _spill(instruction: Instruction) -> Run:
    """STL [R1+0x8], R4: a thread's own memory, by word."""
    where, source = address(instruction.operands[0]), instruction.operands[1]
    reads = [words(source, i) for i in range(size_of(instruction) // 4)]

    def run(block: Block, mask: Array | None) -> None:
        who = chosen(block, mask)
        at = where(block)[who].astype(np.int64) // 4
        for i, read in enumerate(reads):
            block.local[at + i, who] = np.broadcast_to(np.asarray(read(block.state)), (block.state.threads,))[who]

    return run


def _restore(instruction: Instruction) -> Run:
    where = address(instruction.operands[1])
    writes = [store(instruction.operands[0], i) for i in range(size_of(instruction) // 4)]

    def run(block: Block, mask: Array | None) -> None:
        at = where(block).astype(np.int64) // 4 % len(block.local)
        for i, write in enumerate(writes):
            write(block.state, block.local[at + i, np.arange(block.state.threads)], mask)

    return run


ACCESSES: dict[str, Callable[[Instruction], Run]] = {
    "LDG": _load, "LDS": _load, "STG": _store, "STS": _store, "LDGSTS": _copy, "LDGDEPBAR": _commit, "DEPBAR": _wait,
    "SHFL": _shuffle, "REDUX": _reduce,
    "LDSM": _load_matrices, "STSM": _store_matrices, "FENCE": _fence, "STL": _spill, "LDL": _restore,
}  # fmt: skip
