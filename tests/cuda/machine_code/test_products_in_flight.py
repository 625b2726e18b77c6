"""Registers that are written while an asynchronous product may read them: seen in recorded code, and on every way through it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnrestructure.kernels.cuda.machine_code.products_in_flight import hazards
from bnrestructure.kernels.cuda.machine_code.sass import parse

FOLDER = Path(__file__).parent


def code(*lines: str) -> str:
    """Lines of instructions and labels as nvdisasm prints them."""
    numbered = (line if line.startswith(".L") else f"  /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))
    return "\n".join(numbered)


def found(*lines: str) -> list[str]:
    return [f"{hazard.instruction.name} {hazard.what}" for hazard in hazards(parse(code(*lines)))]


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR4], R24, gsb0"
DONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def test_a_forward_kernel_of_triton_3_6_is_refused() -> None:
    """The main loop of the 1x1 forward, 128x128x64, before it waited for its products: ``wait_group 3``, and loads into R92 and more."""
    seen = hazards(parse((FOLDER / "forward_triton_3_6.sass").read_text()))
    assert len(seen) > 50
    assert {hazard.what for hazard in seen} == {"writes to the left operand"}
    assert any(hazard.instruction.name == "LDSM.16.M88.4" for hazard in seen)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("MOV R60, R3", ["MOV writes to the left operand"]),
        ("LDS.128 R60, [R2]", ["LDS.128 writes to the left operand"]),
        ("LDS.64 R58, [R2]", []),  # R58 and R59
        ("LDS.128 R58, [R2]", ["LDS.128 writes to the left operand"]),
        ("LDSM.16.M88.4 R57, [R2]", ["LDSM.16.M88.4 writes to the left operand"]),
        ("IMAD.WIDE R62, R2, 0x2, R4", ["IMAD.WIDE writes to the left operand"]),
        ("ISETP.GE.AND P0, PT, R60, R3, PT", []),  # reading is allowed
        ("STS [R60], R61", []),
        ("SHFL.BFLY PT, R63, R2, 0x1, 0x1f", ["SHFL.BFLY writes to the left operand"]),
        ("@!P2 IADD3 R61, P1, R2, R3, RZ", ["IADD3 writes to the left operand"]),
        ("FADD R24, R2, R3", ["FADD touches the accumulators"]),
        ("FADD R2, R55, R3", ["FADD touches the accumulators"]),
        ("FADD R2, R56, R3", []),  # of 64 x 64 they are R24 to R55
        ("STG.E.128 desc[UR4][R2.64], R52", ["STG.E.128 touches the accumulators"]),
        ("LDGSTS.E.BYPASS.128 [R60], desc[UR4][R2.64]", []),
    ],
)
def test_what_touches_registers_in_flight(line: str, what: list[str]) -> None:
    assert found("WARPGROUP.ARRIVE", PRODUCT, line, DONE, "EXIT") == what
    assert found("WARPGROUP.ARRIVE", PRODUCT, DONE, line, "EXIT") == []


def test_a_wait_leaves_the_newest_groups() -> None:
    other = "HGMMA.64x64x16.F32.BF16 R64, R100, gdesc[UR4], R64, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert found(PRODUCT, other, wait, "MOV R60, RZ", "EXIT") == []
    assert found(PRODUCT, other, wait, "MOV R100, RZ", "EXIT") == ["MOV writes to the left operand"]


def test_a_group_ends_with_its_last_product() -> None:
    first = PRODUCT.removesuffix(", gsb0")
    assert found(first, PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R61, RZ", "EXIT") != []
    assert found(first, DONE, "MOV R61, RZ", "EXIT") != []  # not committed, so not waited for


def test_the_next_turn_of_a_loop_is_followed() -> None:
    turn = ("LDSM.16.M88.4 R60, [R2]", "WARPGROUP.ARRIVE", PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, {}")
    loop = (".L_x_1:", *turn, "@P0 BRA `(.L_x_1)", DONE, "EXIT")
    assert found(*(line.format("0x1") for line in loop)) == ["LDSM.16.M88.4 writes to the left operand"]
    assert found(*(line.format("0x0") for line in loop)) == []


def test_every_way_to_an_instruction_counts() -> None:
    assert found(PRODUCT, "@P0 BRA `(.L_x_1)", DONE, ".L_x_1:", "MOV R60, RZ", "EXIT") == ["MOV writes to the left operand"]
    assert found(PRODUCT, "BRA `(.L_x_1)", "MOV R60, RZ", ".L_x_1:", DONE, "EXIT") == []  # never reached


def test_a_left_operand_in_shared_memory_is_nobodys_register() -> None:
    assert found("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "MOV R60, RZ", "EXIT") == []


def test_what_is_not_understood_is_told() -> None:
    with pytest.raises(ValueError, match="unknown form"):
        found("HGMMA.SP.64x64 R24, R60, gdesc[UR4], R24, gsb0", "MOV R60, RZ", "EXIT")
    with pytest.raises(ValueError, match="no instructions"):
        parse("nothing here")
