"""One kernel compiled for a GPU that is not here, and what is to be seen in the result: what it costs, and what is wrong with it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from bnrestructure.kernels.cuda.launch import Launch
from bnrestructure.kernels.cuda.machine_code.faults import faults
from bnrestructure.kernels.cuda.machine_code.sass import Code, parse
from bnrestructure.kernels.cuda.specialisation import Specialisation

__all__ = ["PARTS", "Compiled", "compile_launch", "disassembled"]

#: Compute capabilities compiled for, and the shared memory that a block may have on each, in bytes.
PARTS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

#: Where a spill is a fault: the tiles are chosen for these, and the others are told what they cost.
_NO_SPILLS = (80, 90)

#: Tensor-core instructions: of sm_80 to sm_89 and sm_120, of sm_90, of sm_100.
_TENSOR_CORE = {"HMMA": r"HMMA\b", "HGMMA": r"HGMMA\b", "UTCMMA": r"UTC\w*MMA\b"}


@dataclass(frozen=True)
class Compiled:
    """One kernel variant on one part. ``spills`` counts loads and stores of spilled registers; ``shared`` are bytes.

    ``tile`` is rows by channels (by depth), of a depthwise kernel also by the height and the width of a patch.
    ``prologue``, ``loop``, ``epilogue``: instructions of a warp before, in one turn of, and behind the longest loop; without a loop all is
    prologue. ``cycles``: what a multiprocessor's four schedulers need to issue one turn of that loop, or without a loop the whole program,
    for all warps.
    ``narrow``: accesses to global memory of 16 bits or less, each of which could have been an eighth of one. ``single``: conversions of one
    number to 16 bits, which sm_90 leaves to the unit that makes the exponentials. ``faults``: see machine_code/faults.py.
    """

    variant: str
    kernel: str
    part: int
    tile: str
    warps: int
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]
    prologue: int
    loop: int
    epilogue: int
    narrow: int
    single: int
    faults: tuple[str, ...]

    @property
    def cycles(self) -> int:
        """See the class."""
        return (self.loop or self.prologue) * self.warps // 4

    @property
    def expected_instruction(self) -> str:
        """What a matrix product should be made of. Warp-group instructions take tiles of 64 rows and more."""
        large = int(self.tile.partition("x")[0]) >= 64
        return {90: "HGMMA", 100: "UTCMMA"}.get(self.part, "HMMA") if large else "HMMA"

    @property
    def complaints(self) -> list[str]:
        """What is wrong with it: too much shared memory, spills on sm_80 or sm_90, a product without tensor cores, and its faults."""
        found = list(self.faults)
        if self.shared > PARTS[self.part]:
            found.append(f"{self.shared} bytes of shared memory, the part has {PARTS[self.part]}")
        if self.spills and self.part in _NO_SPILLS:
            found.append(f"{self.spills} spill instructions")
        if self.kernel.startswith("dense") and not self.instructions[self.expected_instruction]:
            found.append(f"no {self.expected_instruction}")
        return found


def compile_launch(launch: Launch, part: int, variant: str) -> Compiled:
    """Compile one launch for a compute capability (80, 86, ...) and look at the result."""
    special = Specialisation.of(launch, part)
    compiled = special.compile()
    usage, text = disassembled(compiled.asm["cubin"])
    code = parse(text)
    names = [i.name for i in code]
    first, last = code.main_loop or (code.end, code.end - 1)
    return Compiled(
        variant, special.name, part, special.tile, special.warps,
        registers=int(usage.partition("REG:")[2].split()[0]),
        spills=_count(code, r"(STL|LDL)\b"), shared=compiled.metadata.shared,
        instructions={name: sum(bool(re.match(pattern, n)) for n in names) for name, pattern in _TENSOR_CORE.items()},
        prologue=first, loop=last + 1 - first, epilogue=code.end - last - 1,
        narrow=_count(code, r"(LDG|STG)\S*\.[US](8|16)\b"), single=_count(code, r"F2F\.B?F16\.F32\b"),
        faults=tuple(faults(code, usage)),
    )  # fmt: skip


def _count(code: Code, pattern: str) -> int:
    return sum(bool(re.match(pattern, instruction.name)) for instruction in code)


def disassembled(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) as text, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([str(tools / "cuobjdump"), "-res-usage", file.name], [str(tools / "nvdisasm"), "-c", file.name])
        usage, code = (subprocess.run(c, capture_output=True, text=True, check=True) for c in commands)
    return usage.stdout + usage.stderr, code.stdout
