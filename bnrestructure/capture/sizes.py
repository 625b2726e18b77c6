"""Sizes of tensors during a capture: Python numbers that remember how a graph computes them, and that tell when one decides something.

``x.view(n, c // 2, -1)`` becomes nodes of the graph, and holds for every size. ``if n > 3`` cannot: the capture then
holds for inputs of these sizes alone (:attr:`SizeLog.decided`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrestructure.core.errors import CaptureError

__all__ = ["SizeLog", "TracedInt", "TracedSize", "is_traced"]


class SizeLog:
    """Whether any size (or stride) decided something in Python code: a branch, the length of a loop, an index.

    ``uncertain`` is the path of a part whose results' sizes follow from values: from then on no size may decide anything.
    """

    def __init__(self) -> None:
        self.decided = False
        self.uncertain: str | None = None

    def decide(self) -> None:
        """A size decides something. Raises CaptureError where it may follow from values."""
        if self.uncertain is not None:
            raise CaptureError(f"its forward decides by sizes that may follow from values ({self.uncertain} reads some)")
        self.decided = True


class _Traced:
    """A number that follows from sizes. Arithmetic gives further ones; whatever needs its value is noted in the log.

    ``make`` adds the node that computes the number to the graph; it is called once, when the number is used there.
    """

    value: Any

    def __init__(self, value: float, make: Callable[[], fx.Node], log: SizeLog) -> None:
        self.value = value
        self._make = make
        self._log = log
        self._fx_node: fx.Node | None = None

    @property
    def fx_node(self) -> fx.Node:
        """The node that computes the number."""
        if self._fx_node is None:
            self._fx_node = self._make()
        return self._fx_node

    @property  # type: ignore[misc]  # isinstance(n, int) in a forward() takes the branch that it takes in eager mode
    def __class__(self) -> type:
        return type(self.value)

    def decide(self, *_: Any) -> Any:
        """The value, for code that must know it."""
        self._log.decide()
        return self.value

    def _computed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        values = [a.value if is_traced(a) else a for a in arguments]
        if not all(isinstance(v, int | float) for v in values):
            return NotImplemented
        value = function(*values)
        kind = TracedInt if type(value) is int else TracedFloat
        return kind(value, lambda: self._call(function, arguments), self._log)

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
        nodes = tuple(a.fx_node if is_traced(a) else a for a in arguments)
        return next(n for n in nodes if isinstance(n, fx.Node)).graph.call_function(function, nodes)

    def __repr__(self) -> str:  # an assertion's message decides nothing
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __hash__(self) -> int:
        return hash(self.decide())


class TracedFloat(_Traced):
    """A traced float."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """PyTorch's functions take what has this for a number, and hand the call to the recorder, which is the active mode."""
        return NotImplemented


class TracedInt(_Traced, torch.SymInt):
    """A traced int. PyTorch's functions take it where they take sizes, as they take any SymInt."""

    @property
    def node(self) -> _AskedByPyTorch:  # type: ignore[override]  # PyTorch asks it what it asks a SymNode
        """What PyTorch asks when it must know the value."""
        return _AskedByPyTorch(self)


class _AskedByPyTorch:
    """The part of PyTorch's SymNode that C++ code calls before a function mode could see the number."""

    def __init__(self, number: TracedInt) -> None:
        self._number = number
        self.guard_int = self.int_ = self.expect_size = self.guard_size_oblivious = number.decide

    def maybe_as_int(self) -> None:
        """No constant."""

    def is_int(self) -> bool:
        return True

    def is_float(self) -> bool:
        return False

    def is_bool(self) -> bool:
        return False

    def is_constant(self) -> bool:
        return False

    is_symbolic = is_nested_int = is_constant


def is_traced(value: Any) -> bool:
    """Whether this is a traced number (isinstance would ask for its disguise)."""
    return type(value) in (TracedInt, TracedFloat)


def _binary(name: str, function: Callable[..., Any]) -> None:
    def forward(self: _Traced, other: Any) -> Any:
        return self._computed(function, self, other)

    def backward(self: _Traced, other: Any) -> Any:
        return self._computed(function, other, self)

    setattr(_Traced, f"__{name}__", forward)
    setattr(_Traced, f"__r{name}__", backward)


def _unary(name: str, function: Callable[..., Any]) -> None:
    setattr(_Traced, f"__{name}__", lambda self, *rest: self._computed(function, self, *rest))


def _deciding(name: str) -> None:
    def compare(self: _Traced, *others: Any) -> Any:
        values = [o.decide() if is_traced(o) else o for o in others]
        return getattr(self.decide(), f"__{name}__")(*values)

    setattr(_Traced, f"__{name}__", compare)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _binary(_name, getattr(operator, _name))
_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg, "pos": operator.pos, "abs": abs, "round": round, "ceil": math.ceil, "floor": math.floor, "trunc": math.trunc,
}  # fmt: skip
for _name, _function in _UNARY.items():
    _unary(_name, _function)
for _name in (
    "eq", "ne", "lt", "le", "gt", "ge", "bool", "int", "float", "index", "divmod", "rdivmod", "and", "or", "xor", "lshift",
    "rshift", "rand", "ror", "rxor", "rlshift", "rrshift", "invert", "complex",
):  # fmt: skip
    _deciding(_name)
for _name in ("bit_length", "is_integer", "as_integer_ratio", "conjugate"):
    setattr(_Traced, _name, lambda self, name=_name: getattr(self.decide(), name)())


class TracedSize(tuple[Any, ...]):
    """What ``x.shape`` is during a capture: a tuple of traced numbers that passes for a torch.Size."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Size

    def numel(self) -> Any:
        """The product of the sizes."""
        return math.prod(self)
