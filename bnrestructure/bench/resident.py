"""How far the process's resident memory grows while something runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnrestructure.report.memory import peak_memory

__all__ = ["peak_growth"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"


def peak_growth(work: Callable[[], Any], device: str) -> int:
    """Bytes that the process holds at most while ``work()`` runs, over what it held before.

    ``getrusage``, and so ``peak_memory``, gives a process that was started by a larger one the larger one's peak, and a
    process's own earlier peak (from importing, from building the model) hides what comes after it. Linux can put the
    mark back to the present size, and keeps it per program. On a GPU, and where that cannot be done, it is
    ``peak_memory``.
    """
    if device != "cpu" or not _STATUS.exists():
        return peak_memory(work, device)
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:  # forbidden in some sandboxes
        return peak_memory(work, device)
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}")
