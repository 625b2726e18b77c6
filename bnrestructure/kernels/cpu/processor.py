"""What the operating system says of the processor: its name, and whether it multiplies bfloat16 matrices as tiles."""

from __future__ import annotations

import platform
from functools import cache

__all__ = ["has_bfloat16_tiles", "name"]


@cache
def name() -> str:
    """``AMD EPYC 9355 32-Core Processor``, say; the architecture where the system tells no more."""
    return _field("model name") or platform.processor() or platform.machine()


@cache
def has_bfloat16_tiles() -> bool:
    """Whether it has Intel's AMX for bfloat16, which oneDNN's products use and ours do not."""
    return "amx_bf16" in _field("flags").split()


def _field(label: str) -> str:
    """The value of the first line of this label in Linux's description of the processor; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(label):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return ""
