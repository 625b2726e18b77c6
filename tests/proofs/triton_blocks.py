"""Triton kernels run on expressions: the very functions, their blocks arrays of sympy's expressions, their memory lists.

Rounding and narrow types are left out. Masks, offsets and tails are as they stand: what is read or written outside of a tensor, or read
before it was written, is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import sympy as sp
from algebra import NotProved

__all__ = ["Memory", "launch"]


class Block:
    """What Triton calls a tensor."""

    dtype = "float32"

    def __init__(self, values: Any) -> None:
        self.values = np.array(values, dtype=object)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def to(self, dtype: Any, **_: Any) -> Block:
        return self

    def __index__(self) -> int:
        return int(self.values)

    def __getitem__(self, key: Any) -> Block:
        return Block(self.values[key])

    def _with(self, other: Any, function: Callable[[Any, Any], Any]) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Block(function(self.values, _values(other)))

    def __add__(self, other: Any) -> Any:
        return self._with(other, np.add)

    def __radd__(self, other: Any) -> Any:
        return self._with(other, np.add)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, np.subtract)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Any:
        return self._with(other, np.multiply)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a * _reciprocal(b))

    def __rtruediv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b * _reciprocal(a))

    def __floordiv__(self, other: Any) -> Any:
        return self._with(other, np.floor_divide)

    def __mod__(self, other: Any) -> Any:
        return self._with(other, np.mod)

    def __neg__(self) -> Block:
        return Block(-self.values)

    def __lt__(self, other: Any) -> Any:
        return self._with(other, np.less)

    def __ge__(self, other: Any) -> Any:
        return self._with(other, np.greater_equal)

    def __and__(self, other: Any) -> Any:
        return self._with(other, np.logical_and)


def _values(x: Any) -> Any:
    return x.values if isinstance(x, Block) else np.array(x, dtype=object)


def _reciprocal(x: Any) -> Any:
    return np.vectorize(lambda e: sp.Integer(1) / e, otypes=[object])(x)


class Memory:
    """A tensor's memory: ``size`` elements, unwritten, or these."""

    def __init__(self, values: int | list[Any]) -> None:
        self.values: list[Any] = [None] * values if isinstance(values, int) else list(values)

    def array(self, *shape: int) -> Any:
        """All of it, of this shape."""
        return np.array([_element(self, i) for i in range(len(self.values))], dtype=object).reshape(shape)


class Pointer:
    """An address, or a block of them."""

    def __init__(self, memory: Memory, index: Any = 0) -> None:
        self.memory, self.index = memory, _values(index)
        self.dtype = SimpleNamespace(element_ty="float32")

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.index + _values(other))


def _broadcast(*arrays: Any) -> Any:
    return np.broadcast_arrays(*(_values(a) if not isinstance(a, np.ndarray) else a for a in arrays))


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Block:
    index, inside, rest = _broadcast(pointer.index, mask, other)
    found = np.empty(index.shape, dtype=object)
    for at in np.ndindex(index.shape):
        found[at] = _element(pointer.memory, index[at]) if inside[at] else rest[at]
    return Block(found)


def _element(memory: Memory, index: int) -> Any:
    if not 0 <= index < len(memory.values):
        raise NotProved(f"element {index} of {len(memory.values)} is read")
    if memory.values[index] is None:
        raise NotProved(f"element {index} is read before it was written")
    return memory.values[index]


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    index, inside, values = _broadcast(pointer.index, mask, value)
    for at in np.ndindex(index.shape):
        if inside[at]:
            if not 0 <= index[at] < len(pointer.memory.values):
                raise NotProved(f"element {index[at]} of {len(pointer.memory.values)} is written")
            pointer.memory.values[index[at]] = values[at]


def _elementwise(function: Callable[..., Any]) -> Callable[..., Block]:
    return lambda *blocks: Block(np.vectorize(function, otypes=[object])(*(_values(b) for b in blocks)))


def _language(program: tuple[int, ...]) -> SimpleNamespace:
    """``triton.language`` for one program of a grid."""
    return SimpleNamespace(
        program_id=lambda axis: program[axis],
        arange=lambda first, stop: Block(list(range(first, stop))),
        cdiv=lambda a, b: -(-a // b),
        load=_load,
        store=_store,
        where=lambda mask, a, b: Block(np.where(_values(mask).astype(bool), _values(a), _values(b))),
        sum=lambda block, axis: Block(_values(block).sum(axis)),
        fma=lambda a, b, c: a * b + c,
        minimum=_elementwise(min),
        maximum=_elementwise(max),
        sqrt_rn=_elementwise(sp.sqrt),
        zeros=lambda shape, dtype: Block(np.zeros(shape, dtype=object)),
        broadcast_to=lambda block, shape: Block(np.broadcast_to(_values(block), shape)),
        static_range=range,
        static_assert=lambda condition: None,
        constexpr=lambda value: value,
        float32="float32",
        int64="int64",
    )


def _python(function: Any, language: SimpleNamespace, replaced: dict[str, Any]) -> Callable[..., Any]:
    """A kernel, or a function that kernels call, as Python runs it: ``replaced`` functions stand in for those of their names."""
    plain = getattr(function, "fn", function)
    names: dict[str, Any] = {"__builtins__": __builtins__}
    for name in plain.__code__.co_names:
        value = plain.__globals__.get(name)
        if name in replaced:
            names[name] = replaced[name]
        elif name == "tl":
            names[name] = language
        elif hasattr(value, "fn"):
            names[name] = _python(value, language, replaced)
        elif value is not None:
            names[name] = getattr(value, "value", value)
    return FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)


#: Rounding is left out.
_EXACT = {"rounded": lambda x, dtype: x, "dithered": lambda x, pixel, dtype: x, "representable": lambda x, dtype: x}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, replaced: dict[str, Any] | None = None, **constants: Any) -> None:
    """Run every program of the grid; Memory among the arguments is handed over as pointers."""
    given = [Pointer(a) if isinstance(a, Memory) else a for a in arguments]
    for program in product(*(range(n) for n in (*grid, *[1] * (3 - len(grid))))):
        _python(kernel, _language(program), {**_EXACT, **(replaced or {})})(*given, **constants)
