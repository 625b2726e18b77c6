"""Objects that are memory: arrays of NumPy's and of Python's own, bytearrays, numbers of ctypes (what multiprocessing shares, too)."""

from __future__ import annotations

import ctypes
import sys
from array import array
from typing import Any

__all__ = ["memory_of", "write_memory"]

_LARGEST = 1000 * 1024  # bytes
#: What ctypes calls types of numbers: others point to objects, which memory alone does not keep alive.
_NUMBERS = frozenset("?bBhHiIlLqQfdg")


def memory_of(value: Any) -> Any:
    """What is in the memory of such an object: equal for equal contents. None where this is no such object, or a large one."""
    if isinstance(value, bytearray | array):
        return bytes(value) if memoryview(value).nbytes <= _LARGEST else None
    if isinstance(value, memoryview):
        return value.tobytes() if value.c_contiguous and value.nbytes <= _LARGEST else None
    if isinstance(value, ctypes._SimpleCData | ctypes.Array):
        known = _is_of_numbers(type(value)) and ctypes.sizeof(value) <= _LARGEST
        return ctypes.string_at(ctypes.addressof(value), ctypes.sizeof(value)) if known else None
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray | numpy.generic) or value.dtype.hasobject or value.nbytes > _LARGEST:
        return None
    return str(value.dtype), value.shape, value.tobytes()


def write_memory(value: Any, memory: Any) -> None:
    """Put back what :func:`memory_of` said of this object."""
    if isinstance(value, bytearray):
        value[:] = memory
    elif isinstance(value, array):
        value[:] = array(value.typecode, memory)
    elif isinstance(value, memoryview):
        value.cast("B")[:] = memory
    elif isinstance(value, ctypes._SimpleCData | ctypes.Array):
        ctypes.memmove(ctypes.addressof(value), memory, len(memory))
    else:
        numpy = sys.modules["numpy"]
        value[...] = numpy.frombuffer(memory[2], value.dtype).reshape(memory[1])


def _is_of_numbers(kind: Any) -> bool:
    """Whether this type of ctypes is one of numbers, or of arrays of such."""
    return _is_of_numbers(kind._type_) if issubclass(kind, ctypes.Array) else getattr(kind, "_type_", None) in _NUMBERS
