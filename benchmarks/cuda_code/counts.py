"""What a compiled kernel costs, counted in its machine code: instructions, passes over shared memory and shuffles by phase, registers."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from bnrestructure.kernels.cuda.compiled import disassembled
from bnrestructure.kernels.cuda.machine_code.sass import Instruction, parse
from bnrestructure.kernels.cuda.specialisation import Specialisation

__all__ = ["Counts", "Phase", "count"]


@dataclass(frozen=True)
class Phase:
    """Part of a program, for one warp: instructions issued, cycles of the unit behind shared memory, shuffles, tensor-core instructions."""

    issued: int
    shared: int
    shuffles: int


@dataclass(frozen=True)
class Counts:
    """A kernel: before its longest loop, a turn of it, and behind it; all prologue without one. ``shared_bytes``: a block's memory."""

    prologue: Phase
    loop: Phase
    epilogue: Phase
    registers: int
    shared_bytes: int
    warps: int

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor of sm_90 holds at once."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(65536 // registers, 232448 // (self.shared_bytes + 1024), 64 // self.warps, 32)


def _passes(instruction: Instruction) -> int:
    """Cycles that a warp's access takes of the one unit that all four schedulers share, without conflicts: 128 bytes each."""
    size = next((int(m[-3:] if m.endswith("128") else m[-2:]) for m in instruction.modifiers if re.fullmatch(r"[US]?(64|128)", m)), 32)
    if instruction.opcode in ("LDSM", "STSM"):
        return int(instruction.modifiers[-1]) if instruction.modifiers[-1] in ("2", "4") else 1
    return size // 32 if instruction.opcode in ("LDS", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL") else int(instruction.opcode == "SHFL")


def _phase(instructions: tuple[Instruction, ...]) -> Phase:
    return Phase(len(instructions), sum(map(_passes, instructions)), sum(i.opcode == "SHFL" for i in instructions))


def count(special: Specialisation, cache: Path) -> Counts:
    """Compile and count, or take it from ``cache``, a folder of results by kernel source, version of Triton and specialisation."""
    identity = f"{triton.__version__} {special.kernel.cache_key} {special.key}"
    file = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    if not file.exists():
        compiled = special.compile()
        usage, text = disassembled(compiled.asm["cubin"])
        code = parse(text)
        first, last = code.main_loop or (code.end, code.end - 1)
        phases = (code.instructions[:first], code.instructions[first : last + 1], code.instructions[last + 1 : code.end])
        registers = int(usage.partition("REG:")[2].split()[0])
        counts = Counts(*map(_phase, phases), registers, compiled.metadata.shared, special.warps)
        cache.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(counts)))
    found = json.loads(file.read_text())
    phases = [Phase(**found.pop(name)) for name in ("prologue", "loop", "epilogue")]
    return Counts(*phases, **found)
