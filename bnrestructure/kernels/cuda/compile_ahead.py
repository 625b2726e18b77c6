"""Compiles the kernels for GPUs that are not here, and tabulates what the compiler made of them.

    python -m bnrestructure.kernels.cuda.compile_ahead             every variant for every part
    python -m bnrestructure.kernels.cuda.compile_ahead --quick     what the test-suite checks

The wrappers run on meta tensors with their launches recorded (launch.py), so what is compiled is what a device would
have been given: the same tiles, constants and argument types. Needs Triton, and no TRITON_INTERPRET; the
disassemblers are those that come with Triton. Exit status: 1 if the compiler's result has faults, 2 if nothing can be
compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bnrestructure.kernels.cuda.launch import FP_FUSION, Launch, recording
from bnrestructure.kernels.cuda.variants import VARIANTS, Variant

__all__ = ["PARTS", "Compiled", "compile_launch", "compile_variants", "launches", "main"]

#: Compute capabilities compiled for, and the shared memory that a block may have on each, in bytes.
PARTS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

#: Where a spill is a fault: the tiles are chosen for these, and the others are told what they cost.
_NO_SPILLS = (80, 90)

#: Tensor-core instructions: of sm_80 to sm_89 and sm_120, of sm_90, of sm_100.
_TENSOR_CORE = {"HMMA": r"\bHMMA\b", "HGMMA": r"\bHGMMA\b", "UTCMMA": r"\bUTC\w*MMA\b"}

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel variant on one part. ``spills`` counts loads and stores of spilled registers; ``shared`` are bytes.

    ``tile`` is rows by channels (by depth), of a depthwise kernel also by the height and the width of a patch.
    ``cycles``: what a multiprocessor's four schedulers need to issue one turn of the longest loop, or without a loop the whole program, for
    all warps.
    ``narrow``: accesses to global memory of 16 bits or less, each of which could have been an eighth of one. ``single``: conversions of one
    number to 16 bits, which sm_90 leaves to the unit that makes the exponentials.
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
    cycles: int
    narrow: int
    single: int

    @property
    def expected_instruction(self) -> str:
        """What a matrix product should be made of. Warp-group instructions take tiles of 64 rows and more."""
        large = int(self.tile.partition("x")[0]) >= 64
        return {90: "HGMMA", 100: "UTCMMA"}.get(self.part, "HMMA") if large else "HMMA"

    @property
    def complaints(self) -> list[str]:
        """What is wrong with it: too much shared memory, spills on sm_80 or sm_90, a product without tensor cores."""
        found = []
        if self.shared > PARTS[self.part]:
            found.append(f"{self.shared} bytes of shared memory, the part has {PARTS[self.part]}")
        if self.spills and self.part in _NO_SPILLS:
            found.append(f"{self.spills} spill instructions")
        if self.kernel.startswith("dense") and not self.instructions[self.expected_instruction]:
            found.append(f"no {self.expected_instruction}")
        return found


def launches(variant: Variant) -> list[Launch]:
    """The launches of a variant, each kernel's specialisations once."""
    with recording() as recorded:
        variant.run()
    distinct = {repr(_specialised(launch)): launch for launch in recorded}
    return list(distinct.values())


def _specialised(
    launch: Launch,
) -> tuple[str, dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]], int, int]:
    """(kernel, signature, constants, attributes, warps, stages): what Triton compiles for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    names = launch.kernel.arg_names
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        aligned = False
        as_it_is = launch.kernel.params[i].do_not_specialize
        if value is None or (type(value) is int and value == 1 and not as_it_is):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], aligned = _POINTERS[value.dtype], True
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name], aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and not as_it_is
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    ordered = {name: signature[name] for name in names}
    return launch.kernel.__name__, ordered, constants, attributes, launch.warps, launch.stages


def compile_launch(launch: Launch, part: int, variant: str) -> Compiled:
    """Compile one launch for a compute capability (80, 86, ...) and look at the result."""
    kernel, signature, constants, attributes, warps, stages = _specialised(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": FP_FUSION}
    compiled = triton.compile(source, target=GPUTarget("cuda", part, 32), options=options)
    usage, code = _disassembled(compiled.asm["cubin"])
    registers = int(usage.partition("REG:")[2].split()[0])
    tile = "x".join(str(constants[name]) for name in ("BM", "BN", "BK", "BT", "BR", "BC", "HEIGHT", "WIDTH", "BLOCK") if name in constants)
    return Compiled(
        variant, kernel.strip("_"), part, tile, warps, registers,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)), shared=compiled.metadata.shared,
        instructions={name: len(re.findall(pattern, code)) for name, pattern in _TENSOR_CORE.items()},
        cycles=_turn(code) * warps // 4, narrow=len(re.findall(r"\b(?:LDG|STG)\S*\.[US](?:8|16)\b", code)),
        single=len(re.findall(r"\bF2F\.B?F16\.F32\b", code)),
    )  # fmt: skip


def _turn(code: str) -> int:
    """Instructions from a label to the last branch back to it, of the label for which they are most; all where no branch goes back."""
    labels: dict[str, int] = {}
    longest = count = 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            count += 1
            if (target := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and target[1] in labels:
                longest = max(longest, count - labels[target[1]])
    return longest if longest > 1 else count  # every kernel ends in a branch to itself


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) as text."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([str(tools / "cuobjdump"), "-res-usage", file.name], [str(tools / "nvdisasm"), "-c", file.name])
        usage, code = (subprocess.run(c, capture_output=True, text=True, check=True) for c in commands)
    return usage.stdout + usage.stderr, code.stdout


def compile_variants(variants: Iterable[Variant], parts: Iterable[int]) -> Iterator[Compiled]:
    """Every launch of every variant, on every part; what several variants share is listed under the first."""
    seen = set()
    for variant in variants:
        for launch in launches(variant):
            key = repr(_specialised(launch))
            if key in seen:
                continue
            seen.add(key)
            for part in parts:
                yield compile_launch(launch, part, variant.name)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bnrestructure.kernels.cuda.compile_ahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts", type=int, nargs="+", default=list(PARTS), choices=list(PARTS), metavar="SM", help="80 ..."
    )
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument(
        "--quick", action="store_true", help="some variants for sm_80 and sm_90, the first for the other parts"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET is set: nothing is compiled in that mode", file=sys.stderr)
        return 2
    chosen = [variant for variant in VARIANTS if options.only in variant.name]
    if not chosen:
        print(f"no variant is called {options.only!r}: {', '.join(v.name for v in VARIANTS)}", file=sys.stderr)
        return 2
    found = _quick() if options.quick else compile_variants(chosen, options.parts)
    if options.json:
        faults = 0
        for row in found:
            faults += bool(row.complaints)
            print(json.dumps(asdict(row) | {"complaints": row.complaints}), flush=True)
        return int(faults > 0)
    return _print_table(found)


def _quick() -> Iterator[Compiled]:
    yield from compile_variants((variant for variant in VARIANTS if variant.quick), (80, 90))
    yield from compile_variants(VARIANTS[:1], (part for part in PARTS if part not in (80, 90)))


def _print_table(found: Iterable[Compiled]) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "variant",
        "kernel",
        "part",
        "tile",
        "warps",
        "registers",
        "spills",
        "shared KB",
        "cycles",
        "narrow",
        "single",
        "tensor cores",
        "faults",
        box=None,
    )
    faults = 0
    for row in found:
        cores = " ".join(f"{count} {name}" for name, count in row.instructions.items() if count)
        complaints = "; ".join(row.complaints)
        faults += bool(complaints)
        table.add_row(
            row.variant, row.kernel, f"sm_{row.part}", row.tile, str(row.warps), str(row.registers), str(row.spills),
            f"{row.shared / 1024:.0f}", str(row.cycles), str(row.narrow or ""), str(row.single or ""), cores, f"[red]{complaints}[/]",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    console.print(f"{table.row_count} compiled, {faults} with faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
