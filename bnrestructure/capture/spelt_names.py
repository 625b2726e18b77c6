"""The names that a function's code spells: of variables, of attributes, of modules that it imports; and whether it puts names together."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

__all__ = ["Spelt", "codes", "spelt_names"]

_BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "vars"}
#: What finds attributes by names that no code spells, and what finds variables so.
_ANY_ATTRIBUTE = {"attrgetter", "methodcaller", "getmembers", "getattr_static", "__getattribute__", "eval", "exec"}
_ANY_VARIABLE = {"globals", "eval", "exec"}
#: Steps of which one between a name's constant and the call may make another name of it.
_PUTS_TOGETHER = ("BINARY_", "FORMAT_", "BUILD_STRING", "LOAD_METHOD")
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK")


class Spelt(NamedTuple):
    """Names in a piece of code.

    any_attribute   whether it may ask an object for attributes of any name; any_own: or ``self``, of which a module says so itself
    any_variable    whether it may read any global variable
    """

    variables: frozenset[str]
    attributes: frozenset[str]
    imported: frozenset[str]
    any_attribute: bool
    any_own: bool
    any_variable: bool


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
    used = variables | attributes
    places = [i for i, step in enumerate(steps) if step.argval in _BY_NAME and step.opname.startswith("LOAD_")]
    asked = [_asked(steps[i + 1 : i + 20]) for i in places]
    dicts = [steps[i - 1].argval for i, step in enumerate(steps) if step.argval == "__dict__"]
    asked += ["self's" if owner == "self" else "anything's" for owner in dicts]
    if used & _BY_NAME:
        flat = [part for constant in code.co_consts for part in (constant if isinstance(constant, tuple) else (constant,))]
        attributes |= {constant for constant in flat if isinstance(constant, str) and constant.isidentifier()}
    return Spelt(
        _open(variables), _open(attributes), frozenset(imported),
        any_attribute=bool(used & _ANY_ATTRIBUTE) or "anything's" in asked,
        any_own="self's" in asked,
        any_variable=bool(used & _ANY_VARIABLE),
    )  # fmt: skip


def _asked(steps: list[Any]) -> str:
    """Whose attribute ``getattr(...)`` asks for, whose arguments these steps begin with: self's, anything's, or one that it spells."""
    steps = [step for step in steps if step.opname != "PUSH_NULL"]
    if not steps:
        return "anything's"
    first = steps.pop(0)
    pair = first.argval if isinstance(first.argval, tuple) else None  # two variables that one step loads
    if pair is None and first.opname not in _LOADS:
        return "anything's"
    own = (pair or (first.argval,))[0] == "self"
    while pair is None and steps and steps[0].opname == "LOAD_ATTR":
        steps.pop(0)
        own = False
    if pair is None and steps and steps[0].opname == "LOAD_CONST" and str(steps[0].argval).isidentifier():
        until = next((i for i, step in enumerate(steps) if step.opname.startswith(("CALL", "PRECALL"))), len(steps))
        if not any(step.opname.startswith(_PUTS_TOGETHER) for step in steps[:until]):
            return "one that it spells"
    return "self's" if own else "anything's"


def _open(names: set[str]) -> frozenset[str]:
    return frozenset(name for name in names if not name.startswith("__"))
