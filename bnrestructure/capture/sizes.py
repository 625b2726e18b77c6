"""Sizes of tensors during a capture: Python numbers that remember how a graph computes them, and that tell when one decides something.

``x.view(n, c // 2, -1)`` becomes nodes of the graph, and holds for every size. ``if h % 32 != 0`` cannot. Where it follows from the sizes
of the inputs, the capture holds for those of which it is as true (:attr:`SizeLog.conditions`); where it asks an intermediate tensor, for
inputs of these sizes alone (:attr:`SizeLog.decided`).
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import fx

from bnrestructure.capture.messages import is_for_a_message
from bnrestructure.core.errors import CaptureError

__all__ = ["Computed", "InputSize", "SizeLog", "TracedInt", "TracedSize", "is_traced", "still_hold"]


class InputSize(NamedTuple):
    """The size of one dimension of one of the forward's tensors."""

    tensor: int
    dimension: int

    def value(self, shapes: Sequence[torch.Size]) -> Any:
        """The number, for inputs of these shapes."""
        return shapes[self.tensor][self.dimension]


class Computed(NamedTuple):
    """What a function makes of such sizes, of numbers, and of what functions make of them."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def value(self, shapes: Sequence[torch.Size]) -> Any:
        """The number, for inputs of these shapes."""
        return self.function(*[a.value(shapes) if isinstance(a, InputSize | Computed) else a for a in self.arguments])


class SizeLog:
    """What sizes and strides decided in Python code: a branch, the length of a loop, an index.

    conditions    what followed from the sizes of the forward's tensors, and the answer that the code got
    decided    whether anything else decided
    uncertain    path of a part whose results' sizes follow from values: from then on nothing but the forward's tensors' may decide
    """

    def __init__(self) -> None:
        self.decided = False
        self.uncertain: str | None = None
        self.conditions: dict[InputSize | Computed, Any] = {}

    def decide(self) -> None:
        """A size of an intermediate tensor decides something. Raises CaptureError where it may follow from values."""
        if self.uncertain is not None:
            raise CaptureError(f"its forward decides by sizes that may follow from values ({self.uncertain} reads some)")
        self.decided = True

    def note(self, function: Callable[..., Any] | None, arguments: tuple[Any, ...], answer: Any) -> None:
        """The code got this answer from a function of numbers, or (None) learnt the value of the only one."""
        origins = [a.origin if is_traced(a) else a for a in arguments]
        if any(origin is None for origin in origins):
            self.decide()
        else:
            self.conditions[origins[0] if function is None else Computed(function, tuple(origins))] = answer


def still_hold(conditions: dict[InputSize | Computed, Any], shapes: Sequence[torch.Size]) -> bool:
    """Whether inputs of these shapes give every answer that code went by."""
    with suppress(ArithmeticError, ValueError, IndexError):
        return all(origin.value(shapes) == answer for origin, answer in conditions.items())
    return False


class _Traced:
    """A number that follows from sizes. Arithmetic gives further ones; whatever needs its value is noted in the log.

    ``make`` adds the node that computes the number to the graph; it is called once, when the number is used there. ``origin`` is how
    the number follows from the sizes of the forward's own tensors, None where it is of another tensor.
    """

    value: Any

    def __init__(self, value: float, make: Callable[[], fx.Node], log: SizeLog, origin: InputSize | Computed | None) -> None:
        self.value = value
        self.origin = origin
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
        self._log.note(None, (self,), self.value)
        return self.value

    def _computed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        values = [a.value if is_traced(a) else a for a in arguments]
        if not all(isinstance(v, int | float) for v in values):
            return NotImplemented
        last = arguments[-1]
        if function in _DIVISIONS and is_traced(last) and last.origin is not None:
            self._log.note(bool, (last,), bool(last.value))  # by zero it is an error, which code may catch
        value = function(*values)
        kind = TracedInt if type(value) is int else TracedFloat
        origins = tuple(a.origin if is_traced(a) else a for a in arguments)
        origin = None if any(o is None for o in origins) else Computed(function, origins)
        return kind(value, lambda: self._call(function, arguments), self._log, origin)

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
        nodes = tuple(a.fx_node if is_traced(a) else a for a in arguments)
        return next(n for n in nodes if isinstance(n, fx.Node)).graph.call_function(function, nodes)

    def __repr__(self) -> str:
        return repr(self._told())

    def __format__(self, spec: str) -> str:
        return format(self._told(), spec)

    def _told(self) -> Any:
        """The value, for text: a message decides nothing, any other text may."""
        return self.value if is_for_a_message() else self.decide()

    def __hash__(self) -> int:
        return hash(self.decide())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For numpy's functions of numbers: numpy is there if it asks."""
        return importlib.import_module("numpy").asarray(self.decide(), dtype)


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
    def ask(number: float, *others: Any) -> Any:
        if any(type(o) is float for o in others) and name in _COMPARISONS:
            number = float(number)
        return getattr(number, f"__{name}__")(*others)

    def answered(self: _Traced, *others: Any) -> Any:
        answer = ask(self.value, *[o.value if is_traced(o) else o for o in others])
        if answer is not NotImplemented:
            self._log.note(ask, (self, *others), answer)
        return answer

    setattr(_Traced, f"__{name}__", answered)


_DIVISIONS = {operator.truediv, operator.floordiv, operator.mod}
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _binary(_name, getattr(operator, _name))
_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg, "pos": operator.pos, "abs": abs, "round": round, "ceil": math.ceil, "floor": math.floor, "trunc": math.trunc,
}  # fmt: skip
for _name, _function in _UNARY.items():
    _unary(_name, _function)
for _name in (
    *_COMPARISONS, "bool", "int", "float", "index", "divmod", "rdivmod", "and", "or", "xor", "lshift",
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

    def __repr__(self) -> str:
        return f"torch.Size({list(self)!r})"

    def numel(self) -> Any:
        """The product of the sizes."""
        return math.prod(self)
