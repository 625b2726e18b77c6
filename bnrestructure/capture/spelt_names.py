"""The names that a function's code spells: of variables, of attributes, of modules that it imports; and whether it puts names together."""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Iterator
from enum import Enum, auto
from types import CodeType
from typing import NamedTuple

__all__ = ["Spelt", "codes", "spelt_names"]

#: Builtins that take an attribute's name, or, vars, give them all.
_BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "vars"}
#: What finds attributes by names that no code spells; builtins that do are no attributes, as ``layer.eval()`` is.
_ANY_ATTRIBUTE = {"attrgetter", "methodcaller", "getmembers", "getattr_static", "__getattribute__"}
_ANYTHING = {"eval", "exec"}
#: What operations raise for tensors of sizes that do not suit them, Python's own included, and assertions.
_RAISED_FOR_SIZES = {
    "RuntimeError", "ValueError", "IndexError", "LookupError", "ArithmeticError", "ZeroDivisionError", "AssertionError", "Exception",
    "BaseException",
}  # fmt: skip
#: Steps of which one between a name's constant and the call may make another name of it.
_PUTS_TOGETHER = ("BINARY_", "FORMAT_", "BUILD_STRING", "LOAD_METHOD")
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK")


class _Owner(Enum):
    """Whose attribute code asks for by name: that of ``self``, that of any object; or the name is one that it spells."""

    SELF = auto()
    ANY = auto()
    SPELT = auto()


class Spelt(NamedTuple):
    """Names in a piece of code.

    any_attribute   whether it may ask some object for attributes of any name
    any_own         whether it may ask ``self`` for such: what a module is asked for is seen while it runs
    any_variable    whether it may read any global variable
    catches         whether it may catch what an operation raises for tensors of other sizes
    """

    variables: frozenset[str]
    attributes: frozenset[str]
    imported: frozenset[str]
    any_attribute: bool
    any_own: bool
    any_variable: bool
    catches: bool


def codes(code: CodeType) -> Iterator[CodeType]:
    """This piece of code, and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


@functools.lru_cache(maxsize=4096)
def spelt_names(code: CodeType) -> Spelt:
    """The names in this piece of code, but for those of the functions in it. Names that Python has a special meaning for are left out."""
    steps = list(dis.get_instructions(code))
    names: dict[str, set[str]] = {}
    for step in steps:
        if isinstance(step.argval, str):
            names.setdefault(step.opname, set()).add(step.argval)
    variables = {name for step in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL") for name in names.get(step, ())}
    imported = names.get("IMPORT_NAME", set())
    attributes = {name for step in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "IMPORT_FROM") for name in names.get(step, ())}
    places = [i for i, step in enumerate(steps) if step.argval in _BY_NAME and step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    asked = [_asked(steps[i + 1 : i + 20]) for i in places]
    asked += [_Owner.SELF if steps[i - 1].argval == "self" else _Owner.ANY for i, step in enumerate(steps) if step.argval == "__dict__"]
    any_attribute = (variables | attributes) & _ANY_ATTRIBUTE or variables & _ANYTHING or _Owner.ANY in asked
    if places:
        flat = [part for constant in code.co_consts for part in (constant if isinstance(constant, tuple) else (constant,))]
        attributes |= {constant for constant in flat if isinstance(constant, str) and constant.isidentifier()}
    return Spelt(
        _open(variables), _open(attributes), frozenset(imported),
        any_attribute=bool(any_attribute), any_own=_Owner.SELF in asked, any_variable=bool(variables & {"globals", *_ANYTHING}),
        catches=_catches(steps),
    )  # fmt: skip


def _catches(steps: list[dis.Instruction]) -> bool:
    """Whether these steps have a handler of one of ``_RAISED_FOR_SIZES``, or of anything."""
    pairs = list(itertools.pairwise(steps))
    anything = any(step.opname == "PUSH_EXC_INFO" and after.opname == "POP_TOP" for step, after in pairs)
    handled = [i for i, step in enumerate(steps) if step.opname == "CHECK_EXC_MATCH"]
    return anything or any(step.argval in _RAISED_FOR_SIZES for i in handled for step in steps[max(0, i - 6) : i])


def _asked(steps: list[dis.Instruction]) -> _Owner:
    """Whose attribute ``getattr(...)`` asks for, whose arguments these steps begin with."""
    steps = [step for step in steps if step.opname != "PUSH_NULL"]
    if not steps:
        return _Owner.ANY
    first = steps.pop(0)
    if isinstance(first.argval, tuple):  # two variables that one step loads: the name is no constant
        return _Owner.SELF if first.argval[0] == "self" else _Owner.ANY
    if first.opname not in _LOADS:
        return _Owner.ANY
    inside = list(itertools.takewhile(lambda step: step.opname == "LOAD_ATTR", steps))
    name = steps[len(inside) :]
    if name and name[0].opname == "LOAD_CONST" and str(name[0].argval).isidentifier():
        until = list(itertools.takewhile(lambda step: not step.opname.startswith(("CALL", "PRECALL")), name))
        of_constant = len(until) > 1 and until[1].opname == "LOAD_ATTR"  # a method of the text, where no step has that for itself
        if not of_constant and not any(step.opname.startswith(_PUTS_TOGETHER) for step in until):
            return _Owner.SPELT
    return _Owner.SELF if first.argval == "self" and not inside else _Owner.ANY


def _open(names: set[str]) -> frozenset[str]:
    return frozenset(name for name in names if not name.startswith("__"))
