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
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from bnrestructure.kernels.cuda.compiled import PARTS, Compiled, compile_launch
from bnrestructure.kernels.cuda.launch import Launch, recording
from bnrestructure.kernels.cuda.specialisation import Specialisation
from bnrestructure.kernels.cuda.variants import VARIANTS, Variant

__all__ = ["compile_variants", "launches", "main"]


def launches(variant: Variant) -> list[Launch]:
    """The launches of a variant, each kernel's specialisations once."""
    with recording() as recorded:
        variant.run()
    distinct = {Specialisation.of(launch, 0).key: launch for launch in recorded}
    return list(distinct.values())


def compile_variants(variants: Iterable[Variant], parts: Iterable[int]) -> Iterator[Compiled]:
    """Every launch of every variant, on every part; what several variants share is listed under the first."""
    seen = set()
    for variant in variants:
        for launch in launches(variant):
            key = Specialisation.of(launch, 0).key
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
            print(json.dumps(asdict(row) | {"cycles": row.cycles, "complaints": row.complaints}), flush=True)
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
