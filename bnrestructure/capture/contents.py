"""What is in the objects that a module keeps: containers, configurations, counters, arrays. Compared between steps, and put back."""

from __future__ import annotations

import functools
import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bnrestructure.capture.raw_memory import memory_of, write_memory

__all__ = [
    "DEPTH", "Snapshot", "attributes_of", "behind", "contents", "depth_inside", "goes_on", "is_plain_object", "is_proxy", "is_simple",
    "length_of", "parts_of", "state_of",
]  # fmt: skip

_WRITTEN_IN_PYTHON = 1 << 9  # CPython's Py_TPFLAGS_HEAPTYPE
_NO_MORE_THAN_ATTRIBUTES = (object, SimpleNamespace)  # of the classes written in C
#: How far it is looked into what is in what: a container costs one, an object three.
DEPTH = 8
_LARGEST = 1000  # items of a container
_MOST = 5000  # items of containers in containers
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
_CONTAINERS = (dict, list, tuple, deque, set, frozenset, MethodType, functools.partial, weakref.ref)
_ITEMS = (dict, list, tuple, deque, set, frozenset)
_OPAQUE = (nn.Module, Tensor, type, ModuleType, FunctionType, BuiltinFunctionType)


def is_proxy(value: Any) -> bool:
    """Whether this is a weak proxy: it says that it is its object, and raises whatever it is asked once that is gone."""
    return type(value) in weakref.ProxyTypes


def behind(proxy: Any) -> Any:
    """The object that a weak proxy stands for; None where it is gone."""
    try:
        return proxy.__reduce_ex__.__self__
    except ReferenceError:
        return None


def is_simple(value: Any) -> bool:
    """Whether this cannot change, and is what it is equal to."""
    return not is_proxy(value) and _is_simple(value)


def _is_simple(value: Any) -> bool:
    return isinstance(value, _SIMPLE) or (isinstance(value, tuple) and all(isinstance(v, _SIMPLE) for v in value))


def goes_on(value: Any) -> bool:
    """Whether asking this for something changes what it gives next: an iterator, a generator of random numbers."""
    if is_proxy(value):
        return False
    if isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random"):
        return True
    return isinstance(value, Iterator) and not isinstance(value, nn.Module)


def state_of(generator: Any) -> tuple[Callable[[Any], None], Any] | None:
    """How to set the state of a generator of random numbers, and the one that it has; None of an iterator."""
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    if not type(generator).__module__.startswith("numpy.random"):
        return None
    if hasattr(generator, "set_state"):  # NumPy's old ones
        return generator.set_state, generator.get_state()
    bits = getattr(generator, "bit_generator", generator)
    return functools.partial(setattr, bits, "state"), bits.state


def depth_inside(value: Any, depth: int) -> int:
    """How far it is looked into what is in this, where it is looked so far into this itself."""
    return depth - (1 if isinstance(value, _CONTAINERS) else 3)


def length_of(value: Any) -> int | None:
    """Items of a container, whatever its class says of itself: asking a user's code might do anything. None of anything else."""
    kind = next((kind for kind in _ITEMS if issubclass(type(value), kind)), None)
    return None if kind is None else kind.__len__(value)


def parts_of(value: Any) -> dict[Any, Any] | None:
    """What is in a container by key or position, what a method, a partial, a weak reference and a plain object have by name; None for
    anything else.
    """
    kind = type(value)
    if is_proxy(value):
        return parts_of(weakref.ref(found)) if (found := behind(value)) is not None else {"object": None}
    if issubclass(kind, OrderedDict):
        return dict(OrderedDict.items(value))
    if issubclass(kind, dict):
        return dict(dict.items(value))
    for base in (list, tuple, deque):
        if issubclass(kind, base):
            return dict(enumerate(base.__iter__(value)))
    for unordered in (set, frozenset):
        if issubclass(kind, unordered):
            return {item: item for item in unordered.__iter__(value)}
    if isinstance(value, MethodType):
        return {"function": value.__func__, "object": value.__self__}
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    if isinstance(value, weakref.ref):
        target = value()
        return {"object": target if target is None or length_of(target) is not None or is_plain_object(target) else True}
    if not is_plain_object(value):
        return None
    slots = {name for base in type(value).__mro__ for name in _slots_of(base) if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in sorted(slots)}}


def attributes_of(container: Any) -> dict[str, Any] | None:
    """What somebody has set on a container of a class of theirs, beside its items."""
    found = getattr(container, "__dict__", None) if length_of(container) is not None else None
    return found if type(found) is dict else None


def is_plain_object(value: Any) -> bool:
    """Whether this is an object whose attributes are its whole state: a configuration, a namespace, a counter."""
    kind = type(value)
    if issubclass(kind, _OPAQUE) or f"{kind.__module__}.".startswith(("torch.", "numpy.")):
        return False
    if kind.__module__ == "builtins" and not kind.__flags__ & _WRITTEN_IN_PYTHON:  # one that exec() made is a user's
        return False
    if any(base not in _NO_MORE_THAN_ATTRIBUTES and not base.__flags__ & _WRITTEN_IN_PYTHON for base in kind.__mro__):
        return False  # a date, say, which has more than its attributes tell
    return type(getattr(value, "__dict__", None)) is dict or any("__slots__" in vars(base) for base in kind.__mro__)


def _slots_of(kind: type) -> tuple[str, ...]:
    """The attributes that objects of this class have no dict for, and that may be set."""
    named = vars(kind).get("__slots__", ())
    names = (named,) if isinstance(named, str) else tuple(named)
    return tuple(name for name in names if hasattr(vars(kind).get(name), "__set__"))


def contents(value: Any) -> Any:
    """Something equal for equal contents: of containers and plain objects what is in them, of anything else which object it is."""
    return _contents(value, DEPTH, [_MOST])


def _contents(value: Any, depth: int, left: list[int]) -> Any:
    """``left`` is how many more things may be looked at."""
    if is_proxy(value):
        value = behind(value)
    if isinstance(value, _SIMPLE):
        return type(value), value, repr(value) if value == 0 else None  # 1 is no 1.0, and 0.0 no -0.0
    if (memory := memory_of(value)) is not None:
        return type(value), memory
    most = min(_LARGEST, left[0])
    inside = parts_of(value) if depth > 0 and (length_of(value) or 0) <= most else None
    if inside is None or len(inside) > most:
        return _Same(value)
    attributes = attributes_of(value) or {}
    left[0] -= len(inside) + len(attributes)
    depth = depth_inside(value, depth)
    parts = [(_contents(key, 0, left), _contents(item, depth, left)) for own in (inside, attributes) for key, item in own.items()]
    return type(value), len(inside), parts


class _Same:
    """Equal to itself only as a holder of the very same object, which it keeps alive so that its identity is not reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __repr__(self) -> str:
        return f"a {type(self.value).__name__}"

    __hash__ = None  # type: ignore[assignment]


class Snapshot:
    """A container, a plain object or an array as it was."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._memory = memory_of(value)
        self.parts = parts_of(value) if self._memory is None else None

    @property
    def is_of_anything(self) -> bool:
        """Whether this can be looked into at all."""
        return self._memory is not None or self.parts is not None

    def put_back(self) -> bool:
        """Undo what was changed since; whether anything was (which objects are where, by identity)."""
        if self._memory is not None:
            if memory_of(self.value) == self._memory:
                return False
            write_memory(self.value, self._memory)
            return True
        now, before = parts_of(self.value) or {}, self.parts or {}
        if now.keys() == before.keys() and all(map(is_, now.values(), before.values())):
            return False
        self._write(now, before)
        return True

    def _write(self, now: dict[Any, Any], before: dict[Any, Any]) -> None:
        value = self.value
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            kind.clear(value)
            for key, item in before.items():
                kind.__setitem__(value, key, item)
        elif isinstance(value, list | deque):
            value.clear()
            value.extend(before.values())
        elif isinstance(value, set):
            value.clear()
            value.update(before)
        elif is_plain_object(value):  # what else there is cannot change
            for name in now.keys() - before.keys():
                object.__delattr__(value, name)
            for name, item in before.items():
                object.__setattr__(value, name, item)
