"""The processor's name, as the operating system has it."""

from __future__ import annotations

import platform
from functools import cache

__all__ = ["name"]


@cache
def name() -> str:
    """``AMD EPYC 9355 32-Core Processor``, say; the architecture where the system tells no more."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
