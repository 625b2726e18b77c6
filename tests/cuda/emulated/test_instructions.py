"""Single instructions of the emulator, and the accesses that it must refuse, on a few lines of machine code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from needs import needs_triton

from bnrestructure.kernels.cuda.machine_code.sass import parse

pytestmark = needs_triton

Registers = dict[str, Sequence[float] | int | float]


def run(lines: list[str], registers: Registers | None = None, *, warps: int = 1, shared: int = 4096, memory: np.ndarray | None = None):  # type: ignore[no-untyped-def]
    """A block after ``lines`` and EXIT. ``registers``: what they hold before, a number for all threads or one for each; floats as fp32."""
    from emulator.block import Block
    from emulator.memory import GlobalMemory, SharedMemory
    from emulator.program import Program
    from emulator.state import State

    numbered = (line if line.startswith(".L") else f"  /*{16 * i:04x}*/  {line} ;" for i, line in enumerate([*lines, "EXIT"]))
    state, global_memory = State(warps, bytes(1024), (0, 0, 0)), GlobalMemory()
    if memory is not None:
        region = global_memory.add(memory)
        state.registers[100] = np.uint32(region.address & 0xFFFFFFFF)
        state.registers[101] = np.uint32(region.address >> 32)
    for name, value in (registers or {}).items():
        given = np.asarray(value)
        bits = given.astype(np.float32).view(np.uint32) if given.dtype.kind == "f" else given.astype(np.int64).astype(np.uint32)
        state.registers[int(name[1:])] = bits
    block = Block(state, global_memory, SharedMemory(shared, warps))
    with np.errstate(all="ignore"):
        Program(parse("\n".join(numbered))).run(block)
    return block


def word(line: str, registers: Registers, result: str = "R0") -> int:
    return int(run([line], registers).state.registers[int(result[1:])][0])


def number(line: str, registers: Registers) -> float:
    return float(run([line], registers).state.registers[0].view(np.float32)[0])


@pytest.mark.parametrize(
    ("line", "registers", "expected"),
    [
        ("IADD3 R0, R1, -R2, R3", {"R1": 5, "R2": 7, "R3": 1}, -1),
        ("IADD3 R0, R1, ~R2, RZ", {"R1": 5, "R2": 7}, -3),
        ("IMAD R0, R1, R2, R3", {"R1": -3, "R2": 7, "R3": 1}, -20),
        ("IMAD.HI.U32 R0, R1, R2, RZ", {"R1": 0x80000000, "R2": 6}, 3),
        ("IMAD.HI.U32 R0, R1, R2, R4", {"R1": 0x80000000, "R2": 6, "R4": 0, "R5": 10}, 13),
        ("IMAD.SHL.U32 R0, R1, 0x10, RZ", {"R1": 3}, 48),
        ("LEA R0, R1, R2, 0x3", {"R1": 5, "R2": 2}, 42),
        ("LEA.HI R0, R1, R2, RZ, 0x5", {"R1": 0xF8000000, "R2": 4}, 35),
        ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {"R1": -5}, -1),
        ("SHF.R.U32.HI R0, RZ, 0x4, R1", {"R1": 0xF0}, 15),
        ("SHF.L.U32 R0, R1, 0x4, RZ", {"R1": 3}, 48),
        ("SHF.L.U64.HI R0, R1, 0x8, R2", {"R1": 0xAB000000, "R2": 1}, 0x1AB),
        ("SHF.R.U64 R0, R1, 0x8, R2", {"R1": 0, "R2": 0xCD}, 0xCD000000),
        ("LOP3.LUT R0, R1, R2, R3, 0xea, !PT", {"R1": 0b1100, "R2": 0b0101, "R3": 0b10000}, 0b10100),
        ("PRMT R0, R1, 0x7632, R2", {"R1": 0x33221100, "R2": 0x77665544}, 0x77663322),
        ("PRMT R0, R1, 0x9180, R2", {"R1": 0x0000_80FF, "R2": 0}, 0xFF80_FFFF),
        ("SGXT R0, R1, 0x4", {"R1": 0x18}, -8),
        ("SGXT.U32 R0, R1, 0x4", {"R1": 0x18}, 8),
        ("IABS R0, R1", {"R1": -9}, 9),
        ("VIADDMNMX R0, R1, R2, R3, PT", {"R1": 4, "R2": -9, "R3": -2}, -5),
        ("VIMNMX R0, R1, 0x1, !PT", {"R1": -3}, 1),
        ("F2FP.BF16.F32.PACK_AB R0, R1, R2", {"R1": 1.0, "R2": 1.0 + 2**-8}, 0x3F803F80),
        ("F2FP.BF16.F32.PACK_AB R0, R1, R2", {"R1": 1.0 + 3 * 2**-8, "R2": -2.0}, 0x3F82C000),
        ("F2FP.RELU.BF16.F32.PACK_AB R0, R1, R2", {"R1": -1.0, "R2": 2.0}, 0x00004000),
        ("F2FP.F16.F32.PACK_AB R0, R1, R2", {"R1": 0.5, "R2": 1.0}, 0x38003C00),
        ("HFMA2.MMA R0, -RZ, RZ, 0, 1.5", {}, 0x3E00),
        ("F2I.FTZ.U32.TRUNC.NTZ R0, R1", {"R1": 3.99}, 3),
        ("POPC R0, R1", {"R1": 0xFF01}, 9),
    ],
)
def test_words(line: str, registers: Registers, expected: int) -> None:
    assert word(line, registers) == expected & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("line", "registers", "expected"),
    [
        ("FADD R0, R1, -R2", {"R1": 1.5, "R2": 0.25}, 1.25),
        ("FFMA R0, R1, R2, R3", {"R1": 1.0 + 2**-23, "R2": 1.0 - 2**-23, "R3": -1.0}, -(2.0**-46)),
        ("FMUL R0, |R1|, -3", {"R1": -2.0}, -6.0),
        ("FMNMX R0, R1, 6, PT", {"R1": 7.0}, 6.0),
        ("FSEL R0, R1, -INF , PT", {"R1": 7.0}, 7.0),
        ("MUFU.RCP R0, R1", {"R1": 4.0}, 0.25),
        ("MUFU.EX2 R0, R1", {"R1": -2.0}, 0.25),
        ("I2F.RP R0, R1", {"R1": 2**24 + 1}, 2.0**24 + 2),
        ("I2FP.F32.S32 R0, R1", {"R1": -7}, -7.0),
        ("I2F.U16 R0, R1", {"R1": 0x1FFFF}, 65535.0),
        ("I2F.S8 R0, R1", {"R1": 0x1FE}, -2.0),
        ("I2F.S16 R0, R1", {"R1": 0x17FFF}, 32767.0),
        ("HADD2.F32 R0, -RZ, R1.H1_H1", {"R1": 0x3C000000}, 1.0),
    ],
)
def test_numbers(line: str, registers: Registers, expected: float) -> None:
    assert number(line, registers) == expected


def test_carries_run_through_64_bits() -> None:
    lines = ["IADD3 R0, P0, R2, R4, RZ", "IADD3.X R1, R3, R5, RZ, P0, !PT", "IADD3 R6, P1, R4, -R2, RZ", "IADD3.X R7, R5, ~R3, RZ, P1, !PT"]
    a, b = 0x1_FFFFFFFF, 0x3_00000005
    state = run(lines, {"R2": a & 0xFFFFFFFF, "R3": a >> 32, "R4": b & 0xFFFFFFFF, "R5": b >> 32}).state
    assert int(state.registers[0][0]) | int(state.registers[1][0]) << 32 == a + b
    assert int(state.registers[6][0]) | int(state.registers[7][0]) << 32 == b - a


def test_comparisons() -> None:
    lines = [
        "ISETP.LT.U32.AND P0, PT, R2, R4, PT", "ISETP.LT.AND.EX P1, PT, R3, R5, PT, P0", "FSETP.GTU.AND P2, PT, R6, RZ, PT",
        "FSETP.GT.AND P3, PT, R6, RZ, PT", "PLOP3.LUT P4, PT, P1, P2, PT, 0x80, 0x0", "P2R R0, PR, RZ, 0x7f", "R2P PR, R7, 0x3",
        "SEL R1, R2, R3, !P0",
    ]  # fmt: skip
    state = run(lines, {"R2": 9, "R3": -1, "R4": 3, "R5": 0, "R6": float("nan"), "R7": 0b10}).state
    assert int(state.registers[0][0]) == 0b10110  # less by the high word, not a number is unordered, and both
    assert int(state.registers[1][0]) == 9


def test_exchanges_within_a_warp() -> None:
    lane = np.arange(32)
    lines = ["SHFL.BFLY PT, R0, R1, 0x5, 0x1f", "SHFL.IDX PT, R2, R1, 0x3, 0x1f", "SHFL.UP P0, R3, R1, 0x2, RZ", "REDUX.SUM.S32 UR4, R1"]
    state = run(lines, {"R1": lane}).state
    assert (state.registers[0] == lane ^ 5).all()
    assert (state.registers[2] == 3).all()
    assert (state.registers[3] == np.where(lane < 2, lane, lane - 2)).all()
    assert (state.uniform[4] == lane.sum()).all()


def test_threads_part_and_meet_again() -> None:
    """Odd threads take another way, and a loop of their own length."""
    lane = np.arange(32)
    lines = [
        "LOP3.LUT P0, RZ, R1, 0x1, RZ, 0xc0, !PT", "MOV R0, RZ", "@!P0 BRA `(.L_x_2)", ".L_x_1:", "IADD3 R0, R0, 0x1, RZ",
        "ISETP.LT.AND P1, PT, R0, R1, PT", "@P1 BRA `(.L_x_1)", ".L_x_2:", "IADD3 R0, R0, 0x64, RZ",
    ]  # fmt: skip
    block = run(lines, {"R1": lane})
    assert (block.state.registers[0] == np.where(lane % 2, lane, 0) + 100).all()


TID = "S2R R1, SR_TID.X"
SHIFT = "SHF.L.U32 R2, R1, 0x2, RZ"
OTHER = "LOP3.LUT R3, R2, 0x80, RZ, 0x3c, !PT"  # the same thread of the other warp


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([TID, SHIFT, OTHER, "STS [R2], R1", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDS R4, [R3]"], None),
        ([TID, SHIFT, OTHER, "STS [R2], R1", "LDS R4, [R3]"], "read without a barrier"),
        ([TID, SHIFT, "STS [R2], R1", "LDS R4, [R2]"], None),  # its own
        ([TID, SHIFT, OTHER, "STS [R2], R1", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDS R4, [R3]", "STS [R2], R1"], "behind another warp's read"),
        ([TID, SHIFT, OTHER, "STS [R2], R1", "STS [R3], R1"], "behind another warp's write"),
        ([TID, SHIFT, "STS.64 [R2], R4"], "not aligned"),
        ([TID, SHIFT, "STS [R2+0x1000], R4"], "4096|0x1000"),
        ([TID, SHIFT, "IMAD.WIDE R4, R1, 0x4, R100", "LDG.E R6, desc[UR4][R4.64]", "STG.E desc[UR4][R4.64+0x100], R6"], None),
        ([TID, SHIFT, "IMAD.WIDE R4, R1, 0x4, R100", "LDG.E R6, desc[UR4][R4.64+0x304]"], "outside every tensor"),
        ([TID, SHIFT, "IMAD.WIDE R4, R1, 0x4, R100", "LDG.E.128 R8, desc[UR4][R4.64]"], "not aligned"),
        ([TID, "ISETP.LT.AND P0, PT, R1, 0x20, PT", "@P0 EXIT", "BAR.SYNC.DEFER_BLOCKING 0x0"], None),  # who has left is not waited for
    ],
)
def test_accesses_that_come_too_early(lines: list[str], fault: str | None) -> None:
    from emulator import Fault

    memory = np.zeros(1024, np.uint8)
    if fault is None:
        run(lines, warps=2, memory=memory)
    else:
        with pytest.raises(Fault, match=fault):
            run(lines, warps=2, memory=memory)


COPY = [TID, SHIFT, OTHER, "IMAD.WIDE R4, R1, 0x4, R100", "LDGSTS.E [R2], desc[UR4][R4.64]", "LDGDEPBAR"]
WAIT, MEET = "DEPBAR.LE SB0, 0x0", "BAR.SYNC.DEFER_BLOCKING 0x0"


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([WAIT, MEET, "LDS R6, [R3]"], None),
        ([WAIT, "LDS R6, [R2]"], None),
        (["LDS R6, [R2]"], "before the copy"),
        (["DEPBAR.LE SB0, 0x1", MEET, "LDS R6, [R3]"], "before the copy"),
        ([WAIT, "LDS R6, [R3]"], "read without a barrier"),
        (["STS [R2], R1"], "while a copy fills it"),
    ],
)
def test_copies_are_waited_for(lines: list[str], fault: str | None) -> None:
    from emulator import Fault

    memory = np.arange(64, dtype=np.uint32).view(np.uint8).copy()
    if fault is None:
        block = run([*COPY, *lines], warps=2, memory=memory)
        assert sorted(block.state.registers[6]) == list(range(64))
    else:
        with pytest.raises(Fault, match=fault):
            run([*COPY, *lines], warps=2, memory=memory)


def test_what_is_not_known_is_told() -> None:
    with pytest.raises(ValueError, match="not emulated"):
        run(["QUUX R0, R1"])
    with pytest.raises(ValueError, match="not understood"):
        run(["MOV R0, SB7"])
