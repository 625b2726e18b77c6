"""Compiles the CPU kernels: one shared library per instruction set, all from the same sources.

Needs a C++17 compiler with OpenMP and nothing else: no torch headers, no network. ``python -m
bnrestructure.kernels.cpu.build`` builds next to the sources; ``setup.py`` calls :func:`build` when the package is
installed. This module imports only the standard library, so that it runs before the package's dependencies are there.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["INSTRUCTION_SETS", "BuildError", "build", "find_compiler", "library_name", "targets"]

SOURCES = Path(__file__).parent / "src"

COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors wider than the baseline ABI's are never passed between libraries
    "-Wno-uninitialized",  # GCC 12's own AVX-512 headers set off this one and the next
    "-Wno-maybe-uninitialized",
)
SANITIZE_FLAGS = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1", "-DBNR_POISON")

#: Flags of each instruction set, the most capable first. The order is the one in which library.py prefers them.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mprefer-vector-width=512"),
    "avx512bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}

#: Asked, in whichever library there is, before it is known what the CPU can run: never given an instruction set's
#: flags.
BASELINE_SOURCE = "cpu_level.cpp"


class BuildError(RuntimeError):
    """No compiler, or it failed; the message carries what it printed."""


@dataclass(frozen=True)
class _Step:
    """One compiler call whose output is `target`."""

    command: list[str]
    target: Path


def targets() -> list[str]:
    """The instruction sets that make sense on this machine's architecture."""
    return list(INSTRUCTION_SETS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]


def library_name(isa: str, sanitize: bool = False) -> str:
    """File name of an instruction set's library."""
    return f"_kernels_{isa}{'_sanitize' if sanitize else ''}.so"


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of c++, g++, clang++. Raises BuildError when there is none."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def build(
    output: Path | None = None,
    isas: list[str] | None = None,
    *,
    objects: Path | None = None,
    sanitize: bool = False,
    force: bool = False,
    verbose: bool = False,
) -> list[Path]:
    """Builds the libraries of `isas` into the folder `output` and returns the paths of those that were rebuilt.

    Object files go to `objects` (by default `output`/_objects) and, like the libraries, are reused when they are newer
    than everything they were made from. An instruction set that an older compiler does not know is left out, and said so: its
    processors run the next best one. Raises BuildError.
    """
    output = output or Path(__file__).parent
    objects = objects or output / "_objects"
    output.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler()
    compiles, links = [], []
    for isa in isas or targets():
        if not _knows(compiler, INSTRUCTION_SETS[isa]):
            print(f"{shlex.join(compiler)} does not know {' '.join(INSTRUCTION_SETS[isa])}: no kernels for {isa}", file=sys.stderr)
            continue
        folder = objects / (isa + ("_sanitize" if sanitize else ""))
        folder.mkdir(parents=True, exist_ok=True)
        common = [*compiler, *COMMON_FLAGS, *(SANITIZE_FLAGS if sanitize else ())]
        made = []
        changed = force
        for source in sorted(SOURCES.glob("*.cpp")):
            target = folder / (source.stem + ".o")
            made.append(target)
            if force or _is_stale(target, source):
                flags = () if source.name == BASELINE_SOURCE else INSTRUCTION_SETS[isa]
                compiles.append(_Step([*common, *flags, "-MMD", "-c", str(source)], target))
                changed = True
        library = output / library_name(isa, sanitize)
        if changed or not library.exists() or any(library.stat().st_mtime < o.stat().st_mtime for o in made):
            links.append(_Step([*common, "-shared", *map(str, made)], library))
    for steps in (compiles, links):
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda step: _run(step, verbose), steps))
    return [step.target for step in links]


def _knows(compiler: list[str], flags: tuple[str, ...]) -> bool:
    """Whether the compiler accepts the flags; of a compiler that cannot be started the compilation says more."""
    if not flags:
        return True
    try:
        command = [*compiler, *flags, "-x", "c++", "-E", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return True


def _is_stale(target: Path, source: Path) -> bool:
    """Whether an object must be compiled again: missing, or older than a file its dependency list names."""
    dependencies = target.with_suffix(".d")
    if not target.exists() or not dependencies.exists():
        return True
    names = dependencies.read_text().partition(":")[2].replace("\\\n", " ").split()
    made = target.stat().st_mtime
    return any(not Path(name).exists() or Path(name).stat().st_mtime > made for name in [str(source), *names])


def _run(step: _Step, verbose: bool) -> None:
    """Runs a step into a temporary file and renames it, so that nobody ever loads half a library."""
    temporary = step.target.with_name(f".{os.getpid()}.{step.target.name}")
    command = [*step.command, "-o", str(temporary)]
    if "-MMD" in command:
        command += ["-MF", str(step.target.with_suffix(".d"))]
    if verbose:
        print(shlex.join(command), flush=True)
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        temporary.unlink(missing_ok=True)
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    # The time at which the compiler read its sources: an edit during a long compilation must not go unnoticed.
    os.utime(temporary, (started, started))
    os.replace(temporary, step.target)


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m bnrestructure.kernels.cpu.build``."""
    parser = argparse.ArgumentParser(prog="python -m bnrestructure.kernels.cpu.build", description=__doc__)
    parser.add_argument("--isa", action="append", choices=list(INSTRUCTION_SETS), help="only this instruction set")
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    parser.add_argument("--force", action="store_true", help="rebuild what is up to date, too")
    parser.add_argument("--verbose", action="store_true", help="print the compiler's command lines")
    options = parser.parse_args(arguments)
    try:
        made = build(isas=options.isa, sanitize=options.sanitize, force=options.force, verbose=options.verbose)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"built {path}" for path in made) or "up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
