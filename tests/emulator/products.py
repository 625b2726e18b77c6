"""Matrix products: HMMA of a warp, and HGMMA of four, which runs on after it was issued.

An HGMMA takes its left operand, and puts its results, when it is *waited for*: what was written to its registers meanwhile is then in the
result, as it may be on the device. Until then its accumulators hold NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bnrestructure.kernels.cuda.machine_code.sass import Instruction
from emulator.accesses import Run
from emulator.block import Block, Product
from emulator.real import from_bf16
from emulator.state import Array, Fault, State, words

__all__ = ["PRODUCTS"]

_LANE = np.arange(32)
_GROUP, _MEMBER = _LANE >> 2, _LANE & 3


def _halves(words_: Array, kind: str) -> Array:
    """[..., threads] words as fp32 [..., threads, 2], of bf16 or fp16 halves; TF32: [..., threads, 1]."""
    if kind == "TF32":
        return np.ascontiguousarray(words_ & np.uint32(0xFFFFE000))[..., None].view(np.float32)
    pair = np.stack([words_ & np.uint32(0xFFFF), words_ >> np.uint32(16)], axis=-1)
    return from_bf16(pair) if kind == "BF16" else pair.astype(np.uint16).view(np.float16).astype(np.float32)


def _left(registers: Array, kind: str) -> Array:
    """The left operand [..., 16, k] of warps from its four registers [4, ..., 32]: k is 16, of TF32 8."""
    per = 1 if kind == "TF32" else 2
    values = _halves(registers, kind)  # [4, ..., 32, per]
    result = np.zeros((*registers.shape[1:-1], 16, 8 * per), np.float32)
    for i in range(4):
        for j in range(per):
            result[..., _GROUP + 8 * (i & 1), per * _MEMBER + j + 4 * per * (i >> 1)] = values[i, ..., j]
    return result


def _right(registers: Array, kind: str) -> Array:
    """The right operand [..., k, 8] of warps from its two registers [2, ..., 32]."""
    per = 1 if kind == "TF32" else 2
    values = _halves(registers, kind)
    result = np.zeros((*registers.shape[1:-1], 8 * per, 8), np.float32)
    for i in range(2):
        for j in range(per):
            result[..., per * _MEMBER + j + 4 * per * i, _GROUP] = values[i, ..., j]
    return result


def _results(tile: Array) -> Array:
    """A tile [..., 16, 8 * n] as registers [4 * n, ..., 32], two neighbours of row g and two of row g + 8 at a time."""
    count = tile.shape[-1] // 8
    return np.stack([tile[..., _GROUP + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * _MEMBER + (i & 1)] for i in range(4 * count)])


def _tile(registers: Array) -> Array:
    """The other way round."""
    count = len(registers) // 4
    tile = np.zeros((*registers.shape[1:-1], 16, 8 * count), np.float32)
    for i, values in enumerate(registers):
        tile[..., _GROUP + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * _MEMBER + (i & 1)] = values
    return tile


def _number(text: str) -> int | None:
    found = re.match(r"R(\d+)", text)
    return int(found[1]) if found else None


def _taken(state: State, text: str, count: int) -> Array:
    """``count`` registers from the named one on, [count, warps, 32]; zeros for RZ."""
    reads = [words(text if text == "RZ" else f"R{(_number(text) or 0) + i}") for i in range(count)]
    return np.stack([np.broadcast_to(np.asarray(read(state)), (state.threads,)) for read in reads]).reshape(count, state.warps, 32)


def _put(state: State, first: int, values: Array, warps: Array) -> None:
    """``values`` [count, warps, 32] of fp32 into registers from ``first`` on."""
    where = state.registers[first : first + len(values)].reshape(len(values), state.warps, 32)
    where[:, warps] = np.ascontiguousarray(values, np.float32).view(np.uint32)


def _kind(instruction: Instruction) -> str:
    return next((m for m in instruction.modifiers if m in ("BF16", "TF32")), "F16")


def _multiply_warp(instruction: Instruction) -> Run:
    """HMMA.16816.F32.BF16 d, a, b, c and its like, done when the next instruction reads it."""
    shape = {"16816": (4, 2), "1688": (4, 2) if _kind(instruction) == "TF32" else (2, 1), "1684": (2, 1)}[instruction.modifiers[0]]
    if shape != (4, 2):
        raise ValueError(f"not emulated: {instruction}")
    d, a, b, c = instruction.operands[:4]
    kind, first = _kind(instruction), _number(d)

    def run(block: Block, mask: Array | None) -> None:
        state = block.state
        warps = block.warps_of(mask)
        left, right = _left(_taken(state, a, 4), kind), _right(_taken(state, b, 2), kind)
        added = _tile(_taken(state, c, 4).view(np.float32))
        total = (left.astype(np.float64) @ right.astype(np.float64) + added).astype(np.float32)
        if first is not None:
            _put(state, first, _results(total)[:, warps], warps)

    return run


def _matrix(block: Block, descriptor: int, columns: int, depth: int, item: int, by_columns: bool) -> Array:
    """Positions in shared memory of a matrix [columns, depth] of ``item`` bytes, as its descriptor says; [columns, depth, item].

    ``by_columns``: neighbours in memory are neighbours along ``columns`` (.tnspB). In units of 16 bytes: where it starts (bits 0 to 13),
    the leading (16 to 29) and the stride offset (32 to 45); from bit 62 on how far rows are swizzled: not, 128, 64 or 32 bytes.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    row = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    n, k = np.arange(columns)[:, None], np.arange(depth)[None, :]
    if by_columns:
        per = row // item
        at = start + k // 8 * stride + k % 8 * row + n // per * leading + n % per * item
    elif row == 16:
        at = start + n // 8 * stride + n % 8 * 16 + k * item // 16 * leading + k * item % 16
    else:
        at = start + n // 8 * stride + n % 8 * row + k * item
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[row]
    at = at ^ ((at >> 7 & bits) << 4)
    return at[..., None] + np.arange(item)


def _values(raw: Array, kind: str) -> Array:
    """[rows, columns, bytes] as fp32."""
    if kind == "TF32":
        return _halves(np.ascontiguousarray(raw).view(np.uint32)[..., 0], kind)[..., 0]
    half = np.ascontiguousarray(raw).view(np.uint16)[..., 0]
    return from_bf16(half) if kind == "BF16" else half.view(np.float16).astype(np.float32)


def _descriptor(state: State, text: str, offset: int, warp: int) -> int:
    """Two uniform registers of a warp's group as one number. ``text``: gdesc[UR4]."""
    found = re.match(r"gdesc\[UR(\d+)\]", text)
    if found is None:
        raise ValueError(f"a descriptor that is not understood: {text}")
    low, high = (state.uniform[int(found[1]) + offset + i].reshape(-1, 32)[warp : warp + 4] for i in (0, 1))
    if (low != low[0, 0]).any() or (high != high[0, 0]).any():
        raise Fault("the warps of a group give different descriptors to one product")
    return int(low[0, 0]) | int(high[0, 0]) << 32


def _multiply_group(instruction: Instruction) -> Run:
    operands = list(instruction.operands)
    closes = operands[-1] == "gsb0"
    operands = [o for o in operands if o != "gsb0"]
    shape = [int(n) for n in instruction.modifiers[0].split("x")]
    kind = _kind(instruction)
    item = 4 if kind == "TF32" else 2
    first = _number(operands[0])
    in_registers = not operands[1].startswith("gdesc")
    descriptor = operands[2] if in_registers else operands[1]
    if first is None:
        raise ValueError(f"not emulated: {instruction}")
    empty = operands[-1] in ("!UPT", "!PT") or "RZ" in operands

    def run(block: Block, mask: Array | None) -> None:
        if mask is not None:
            raise Fault("a product of a warp group that some threads do not take part in")
        for warp in range(0, block.state.warps, 4):
            _begin(block, warp)

    def _begin(block: Block, warp: int) -> None:
        state, warps = block.state, np.arange(warp, warp + 4)
        at = _matrix(block, _descriptor(state, descriptor, 2, warp), shape[1], shape[2], item, ".tnspB" in descriptor)
        right = _values(block.shared.begin_product(at.reshape(-1), warps).reshape(at.shape), kind)
        shared, left = [at.reshape(-1)], None
        if not in_registers:
            at = _matrix(block, _descriptor(state, descriptor, 0, warp), 64, shape[2], item, ".tnspA" in descriptor)
            left = _values(block.shared.begin_product(at.reshape(-1), warps).reshape(at.shape), kind).reshape(4, 16, -1)
            shared.append(at.reshape(-1))
        running = [p for p in block.products if p.warps[0] == warp]
        count = shape[1] // 2
        taken = _taken(state, operands[0], count).view(np.float32)[:, warps].copy()
        before: Any = np.zeros_like(taken) if empty else taken

        def finish() -> None:
            a = _left(_taken(state, operands[1], 4)[:, warps], kind) if left is None else left
            added = _taken(state, operands[0], count).view(np.float32)[:, warps] if running else before
            total = a.astype(np.float64) @ right.T.astype(np.float64) + _tile(added)
            _put(state, first, _results(total.astype(np.float32)), warps)

        if not running:
            _put(state, first, np.full_like(taken, np.nan), warps)
        block.begin_product(Product(warps, shared, finish), closes)

    return run


def _wait(instruction: Instruction) -> Run:
    """WARPGROUP.DEPBAR.LE gsb0, n. WARPGROUP.ARRIVE comes before products and changes nothing that is kept here."""
    if instruction.modifiers[0] != "DEPBAR":
        return lambda block, mask: None
    allowed = int(instruction.operands[1], 16)
    return lambda block, mask: block.wait_for_products(block.warps_of(mask), allowed)


PRODUCTS: dict[str, Callable[[Instruction], Run]] = {"HMMA": _multiply_warp, "HGMMA": _multiply_group, "WARPGROUP": _wait}
