"""What is wrong with a kernel's machine code, in one line each: what an inspection before the first launch refuses."""

from __future__ import annotations

import re

from bnrestructure.kernels.cuda.machine_code.products_in_flight import hazards
from bnrestructure.kernels.cuda.machine_code.sass import Code

__all__ = ["faults"]


def faults(code: Code, usage: str) -> list[str]:
    """All that is found in ``code`` and in what ``cuobjdump -res-usage`` says of it."""
    return [*_registers_in_flight(code), *_local_memory(usage)]


def _registers_in_flight(code: Code) -> list[str]:
    found = hazards(code)
    return [f"{len(found)} times registers in flight, first: {found[0]}"] if found else []


def _local_memory(usage: str) -> list[str]:
    """Arrays in local memory, which are indexed at run time; the stack is where spilled registers go."""
    local = re.search(r"\bLOCAL:(\d+)", usage)
    return [f"{local[1]} bytes of local memory"] if local and int(local[1]) else []
