"""Which attributes of which modules a forward() reads while it is captured: a program holds until one of those changes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bnrestructure.capture.contents import goes_on
from bnrestructure.core.errors import CaptureError

__all__ = ["Reads", "not_recording", "recording_reads"]

#: What every module has: PyTorch's own bookkeeping, which ModuleState watches by other means.
_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"__dict__", "__class__", "parametrizations", "_compiled_call_impl"}

_active = threading.local()


class Reads:
    """The attributes read so far, for each module by name; absent ones too. ``everything`` holds modules whose __dict__ was read whole."""

    def __init__(self) -> None:
        self.names: dict[nn.Module, set[str]] = {}
        self.names_outside: dict[nn.Module, set[str]] = {}
        self.everything: set[nn.Module] = set()

    def add(self, module: nn.Module, name: str, reader: str) -> None:
        """Note one read, by code of the Python module ``reader``."""
        self.names.setdefault(module, set()).add(name)
        if not reader.startswith(("torch.nn.modules.", "bnrestructure.")):
            self.names_outside.setdefault(module, set()).add(name)

    def of(self, module: nn.Module) -> set[str]:
        """The names read on this module."""
        return self.names.get(module, set())

    def outside(self, module: nn.Module) -> set[str]:
        """Those of them that other code than PyTorch's layers, and the tracer itself, has read."""
        return self.names_outside.get(module, set())


@contextmanager
def recording_reads(reads: Reads) -> Iterator[None]:
    """Note the attributes that this thread reads on any module."""
    previous = getattr(_active, "reads", None)
    _active.reads = reads
    nn.Module.__getattribute__ = _getattribute  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        _active.reads = previous
        if previous is None:
            del nn.Module.__getattribute__


@contextmanager
def not_recording() -> Iterator[None]:
    """No reads are noted: what a layer reads that a graph calls as it is, it reads again when it is called."""
    reads, _active.reads = getattr(_active, "reads", None), None
    try:
        yield
    finally:
        _active.reads = reads


def _getattribute(self: nn.Module, name: str) -> Any:
    reads = getattr(_active, "reads", None)
    if reads is not None:
        reader = sys._getframe(1).f_globals.get("__name__", "")
        if name == "__dict__":
            if not reader.startswith(("torch.nn.modules.module", "bnrestructure.")):
                reads.everything.add(self)
        elif name not in _BOOKKEEPING and not name.startswith("__") and not _hides_instances(self, name):
            reads.add(self, name, reader)
            if goes_on(object.__getattribute__(self, "__dict__").get(name)):
                raise CaptureError(f"its forward reads the attribute {name!r}, whose next value nothing in a graph knows")
    return object.__getattribute__(self, name)


def _hides_instances(module: nn.Module, name: str) -> bool:
    """Whether this is a property: an attribute of the instance by that name would not be found."""
    return hasattr(getattr(type(module), name, None), "__set__")
