"""Finds, loads and calls the compiled CPU kernels.

The library is the most capable one this machine's CPU can run; ``BNRESTRUCTURE_CPU_ISA`` forces another
(``amx``, ``avx512bf16``, ``avx512``, ``avx2``, ``portable``), and ``BNRESTRUCTURE_CPU_SANITIZE=1`` asks for the sanitized build.
Kernels are declared once, at import, and bound to the library on their first call::

    _sweep = library.declare("bnr_normalise_forward")
    _sweep.call(ctypes.byref(arguments))     # one of structures.py
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bnrestructure.kernels import tuning
from bnrestructure.kernels.cpu.structures import layout

__all__ = [
    "CPU_LEVELS",
    "Kernel",
    "available_isas",
    "damaged",
    "declare",
    "isa_name",
    "load",
    "sources_digest",
    "unavailable_reason",
    "use",
]

_FOLDER = Path(__file__).parent

#: Instruction sets, the most capable first, and the level that src/cpu_level.cpp gives a CPU that has it.
CPU_LEVELS = {"amx": 4, "avx512bf16": 3, "avx512": 2, "avx2": 1, "portable": 0}

#: PyTorch's name for a CPU's abilities -> the level that such a CPU has at least.
_LEVELS_OF_PYTORCH = {"AVX2": 1, "AVX512": 2}

# Of an ELF file's header: where its table of sections begins, bytes of an entry, entries. Of an entry: type, first byte, bytes.
_ELF_HEADER = struct.Struct("<40xQ10xHH2x")
_ELF_SECTION = struct.Struct("<4xI16xQQ")
_WITHOUT_BYTES = 8  # the type of a section that takes no room in the file

_loaded: tuple[str, ctypes.CDLL] | None = None
_failure: str | None = None
_kernels: list[Kernel] = []


class Kernel:
    """One C function of one structure. ``call`` is the function in the library that is loaded at the time, without Python around it."""

    __slots__ = ("_name", "call")

    call: Callable[[Any], None]

    def __init__(self, name: str) -> None:
        self._name = name
        self.call = self._bind

    def _bind(self, arguments: Any) -> None:
        function = getattr(load(), self._name)
        function.restype = None
        function.argtypes = [ctypes.c_void_p]
        self.call = function
        function(arguments)

    def unbind(self) -> None:
        """Forgets the library; the next call binds again."""
        self.call = self._bind


def declare(name: str) -> Kernel:
    """The C function ``name``, which takes a pointer to one of the structures."""
    kernel = Kernel(name)
    _kernels.append(kernel)
    return kernel


def load() -> ctypes.CDLL:
    """The kernels' library, loaded on the first call. Without one: RuntimeError with :func:`unavailable_reason`."""
    if reason := unavailable_reason():
        raise RuntimeError(f"the CPU kernels are not available: {reason}")
    assert _loaded is not None
    return _loaded[1]


def isa_name() -> str:
    """The instruction set of the loaded library. Raises RuntimeError when there is none."""
    load()
    assert _loaded is not None
    return _loaded[0]


def unavailable_reason() -> str | None:
    """Why the CPU kernels cannot be used here, in one line; None when they can."""
    global _loaded, _failure
    if _loaded is None and _failure is None:
        try:
            _loaded = _open(os.environ.get("BNRESTRUCTURE_CPU_ISA"))
        except (OSError, RuntimeError) as error:
            _failure = str(error)
    return _failure


def available_isas() -> list[str]:
    """The instruction sets whose library is built here and loads, on this CPU, the most capable first."""
    return [isa for isa, fault in _found().items() if fault is None]


def damaged() -> dict[str, str]:
    """The instruction sets that this CPU could run, were it not for their library's file, and what is wrong with that."""
    return {isa: fault for isa, fault in _found().items() if fault is not None}


def _found() -> dict[str, str | None]:
    """The instruction sets that are built and that this CPU can run, and what is wrong with the library of each."""
    built = [isa for isa in CPU_LEVELS if _path(isa).exists()]
    faults: dict[str, str | None] = {}
    surely = _LEVELS_OF_PYTORCH.get(torch.backends.cpu.get_cpu_capability(), 0)
    # From the least capable on, and not beyond what the CPU surely runs: a library of other instructions must not be loaded.
    for isa in reversed(built):
        if CPU_LEVELS[isa] > surely:
            return faults or {isa: f"{_path(isa).name} was not tried: there is no other library to say whether this CPU can run it"}
        faults[isa] = _fault(_path(isa))
        if faults[isa] is None:
            level = int(ctypes.CDLL(str(_path(isa))).bnr_cpu_level())
            return {isa: _fault(_path(isa)) for isa in built if CPU_LEVELS[isa] <= level}
    return faults


@contextmanager
def use(isa: str) -> Iterator[None]:
    """Calls the kernels of another instruction set within the block (for tests and benchmarks; not thread-safe)."""
    global _loaded, _failure
    previous = _loaded, _failure
    _loaded, _failure = _open(isa), None
    try:
        _changed()
        yield
    finally:
        _loaded, _failure = previous
        _changed()


def sources_digest() -> str:
    """Twelve hexadecimal digits that change with the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted((_FOLDER / "src").iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _changed() -> None:
    """Another library is loaded: kernels are bound anew, and choices among them made anew."""
    for kernel in _kernels:
        kernel.unbind()
    tuning.renew()


def _path(isa: str) -> Path:
    suffix = "_sanitize" if os.environ.get("BNRESTRUCTURE_CPU_SANITIZE") == "1" else ""
    return _FOLDER / f"_kernels_{isa}{suffix}.so"  # the name that build.py gives it


@cache
def _fault(path: Path) -> str | None:
    """What is wrong with a library's file, or None. Only what looks whole is loaded to see: a truncated one would kill the process."""
    try:
        if (reason := _truncation(path)) is not None:
            return f"{path.name} is damaged: {reason}"
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} is damaged: {error}"
    if (found := getattr(library, "bnr_layout", None)) is not None:
        found.restype = ctypes.c_char_p
        if found().decode() == layout():
            return None
    return f"{path.name} was built of other sources: python -m bnrestructure.kernels.cpu.build"


def _truncation(path: Path) -> str | None:
    """Why a library in the ELF format (of 64 bits, little-endian) is not whole, or None: all sections must lie within the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(_ELF_HEADER.size)
        if header[:6] != b"\x7fELF\x02\x01":
            return None  # another system's format, or none at all: the loader says so itself
        if len(header) < _ELF_HEADER.size:
            return f"it ends after {size} bytes"
        offset, entry, count = _ELF_HEADER.unpack(header)
        file.seek(offset)
        table = file.read(entry * count)
    if not count or len(table) < entry * count or entry < _ELF_SECTION.size:
        return f"it ends after {size} bytes, before its table of sections"
    sections = [_ELF_SECTION.unpack_from(table, i * entry) for i in range(count)]
    ends = [begin + length for kind, begin, length in sections if kind != _WITHOUT_BYTES]
    if max(ends) > size or not any(kind for kind, _, _ in sections):
        return f"it ends after {size} bytes, before its sections"
    return None


def _open(isa: str | None) -> tuple[str, ctypes.CDLL]:
    """Loads the library of ``isa``, or the best one. torch is imported by now: its OpenMP runtime is shared."""
    available, faults = available_isas(), damaged()
    if not available and not faults:
        raise RuntimeError("they are not compiled (python -m bnrestructure.kernels.cpu.build says why)")
    if isa is not None and isa not in CPU_LEVELS:
        raise RuntimeError(f"unknown instruction set {isa!r} (one of {', '.join(CPU_LEVELS)})")
    if isa in faults or not available:
        raise RuntimeError(faults[isa] if isa in faults else "; ".join(faults.values()))
    if isa is None:
        isa = available[0]
    elif isa not in available:
        raise RuntimeError(f"the {isa} library is not built or this CPU cannot run it ({', '.join(available)} can)")
    return isa, ctypes.CDLL(str(_path(isa)))
