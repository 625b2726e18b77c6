"""Finds, loads and calls the compiled CPU kernels.

The library is the most capable one this machine's CPU can run; ``BNRESTRUCTURE_CPU_ISA`` forces another
(``amx``, ``avx512bf16``, ``avx512``, ``avx2``, ``portable``), and ``BNRESTRUCTURE_CPU_SANITIZE=1`` asks for the sanitized build.
Kernels are declared once, at import, and bound to the library on their first call::

    _sweep = library.declare("bnr_sweep", "piifp")     # p pointer or None, i int64, f float, d double
    _sweep(x.data_ptr(), n, channels, slope, None)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = [
    "CPU_LEVELS",
    "Kernel",
    "available_isas",
    "declare",
    "isa_name",
    "load",
    "sources_digest",
    "threads",
    "unavailable_reason",
    "use",
]

_FOLDER = Path(__file__).parent
_ARGUMENT_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}

#: Instruction sets, the most capable first, and the level that src/cpu_level.cpp gives a CPU that has it.
CPU_LEVELS = {"amx": 4, "avx512bf16": 3, "avx512": 2, "avx2": 1, "portable": 0}

_loaded: tuple[str, ctypes.CDLL] | None = None
_failure: str | None = None
_kernels: list[Kernel] = []


class Kernel:
    """One C function. Calling it calls the function in the library that is loaded at the time."""

    __slots__ = ("_function", "_name", "_signature")

    def __init__(self, name: str, signature: str) -> None:
        self._name = name
        self._signature = signature.replace(" ", "")
        self._function = self._bind

    def __call__(self, *arguments: int | float | bytes | None) -> None:
        self._function(*arguments)

    def _bind(self, *arguments: int | float | bytes | None) -> None:
        function = getattr(load(), self._name)
        function.restype = None
        function.argtypes = [_ARGUMENT_TYPES[letter] for letter in self._signature]
        self._function = function
        function(*arguments)

    def unbind(self) -> None:
        """Forgets the library; the next call binds again."""
        self._function = self._bind


def declare(name: str, signature: str) -> Kernel:
    """The C function ``name``, whose arguments have the types ``signature`` spells.

    p is a pointer, i an int64, f a float, d a double; spaces are ignored.
    """
    kernel = Kernel(name, signature)
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
    """The instruction sets that are built here and that this CPU can run, the most capable first."""
    built = [isa for isa in CPU_LEVELS if _path(isa).exists()]
    if not built:
        return []
    level = int(ctypes.CDLL(str(_path(built[-1]))).bnr_cpu_level())
    return [isa for isa in built if CPU_LEVELS[isa] <= level]


@contextmanager
def use(isa: str) -> Iterator[None]:
    """Calls the kernels of another instruction set within the block (for tests and benchmarks; not thread-safe)."""
    global _loaded, _failure
    previous = _loaded, _failure
    _loaded, _failure = _open(isa), None
    try:
        _unbind_all()
        yield
    finally:
        _loaded, _failure = previous
        _unbind_all()


def sources_digest() -> str:
    """Twelve hexadecimal digits that change with the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted((_FOLDER / "src").iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def threads() -> int:
    """How many threads a kernel may use: PyTorch's setting."""
    return torch.get_num_threads()


def _unbind_all() -> None:
    for kernel in _kernels:
        kernel.unbind()


def _path(isa: str) -> Path:
    suffix = "_sanitize" if os.environ.get("BNRESTRUCTURE_CPU_SANITIZE") == "1" else ""
    return _FOLDER / f"_kernels_{isa}{suffix}.so"  # the name that build.py gives it


def _open(isa: str | None) -> tuple[str, ctypes.CDLL]:
    """Loads the library of ``isa``, or the best one. torch is imported by now: its OpenMP runtime is shared."""
    available = available_isas()
    if not available:
        raise RuntimeError("they are not compiled (python -m bnrestructure.kernels.cpu.build says why)")
    if isa is None:
        isa = available[0]
    elif isa not in CPU_LEVELS:
        raise RuntimeError(f"unknown instruction set {isa!r} (one of {', '.join(CPU_LEVELS)})")
    elif isa not in available:
        raise RuntimeError(f"the {isa} library is not built or this CPU cannot run it ({', '.join(available)} can)")
    return isa, ctypes.CDLL(str(_path(isa)))
