"""Numbers and flags that a forward's functions find around them: globals and variables of the functions that they were made in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from bnrestructure.capture.contents import is_simple

__all__ = ["Variable", "forward_of", "variables_of"]

#: Whose functions decide by nothing that a user would change between two steps.
_LIBRARIES = ("torch.", "numpy.", "bnrestructure.", "collections.", "functools.", "math.", "typing.")


class Variable(NamedTuple):
    """One that is simple, and its value."""

    name: str
    home: dict[str, Any] | CellType
    value: Any

    def is_as_it_was(self) -> bool:
        """Whether it has that value still."""
        if isinstance(self.home, dict):
            return self.home.get(self.name) is self.value
        return _inside(self.home) is self.value


def forward_of(module: nn.Module) -> FunctionType | None:
    """The function that its class, as the user wrote it, has for its forward."""
    found = (vars(base).get("forward") for base in type(module).__mro__)
    return next((f for f in found if isinstance(f, FunctionType) and not _written_in(f).startswith("bnrestructure.")), None)


def variables_of(functions: Iterable[Any]) -> list[Variable]:
    """The simple variables that these functions name, and the functions that these name."""
    found: dict[tuple[int, str], Variable] = {}
    left, seen = list(functions), set()
    while left:
        function = left.pop()
        function = getattr(function, "__func__", function)  # of a class or static method
        if not isinstance(function, FunctionType) or id(function) in seen or _written_in(function).startswith(_LIBRARIES):
            continue
        seen.add(id(function))
        for name, home, value in _named(function):
            if is_simple(value):
                found[id(home), name] = Variable(name, home, value)
            else:
                left.append(value)
    return list(found.values())


def _written_in(function: FunctionType) -> str:
    """The Python module that a function's code is in, whatever it passes itself off as."""
    return f"{function.__globals__.get('__name__', '')}."


def _named(function: FunctionType) -> Iterator[tuple[str, Any, Any]]:
    values = function.__globals__
    for code in _codes(function.__code__):
        for name in code.co_names:
            if name in values and not name.startswith("__"):
                yield name, values, values[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, cell, _inside(cell)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _inside(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return cell
