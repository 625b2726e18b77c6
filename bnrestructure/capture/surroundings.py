"""What a forward's functions find around them: globals, closures, defaults, configuration objects, classes and modules.

Nothing tells what a function reads there while it runs. So its code is asked: a name that it spells, as a variable, an attribute or a
string, may be read. That is more than it reads; what is missing are names that are put together while it runs.
"""

from __future__ import annotations

import argparse
import dis
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from bnrestructure.capture.contents import contents, is_plain_object, is_simple

__all__ = ["Variable", "class_with_forward", "variables_of"]

#: Whose code decides by nothing that a user would change between two steps.
_LIBRARIES = frozenset({"torch", "numpy", "bnrestructure", *sys.stdlib_module_names})
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_CACHED = type(functools.cache(len))
_CONTAINERS = (dict, list, tuple, set, frozenset)
_INSTALLED = re.compile(r"[/\\\\](site|dist)-packages[/\\\\]")
_FEW = 20  # items of a container that are looked into for functions and objects
_ABSENT = object()
#: Where a variable is: globals, the attributes of an object, a class or a module; a closure's cell; a function, for its defaults.
_Home = Mapping[str, Any] | CellType | FunctionType


class Variable(NamedTuple):
    """A name in ``home``, its value, and what is in that where it is compared whole."""

    name: str
    home: _Home
    value: Any
    inside: Any

    def is_as_it_was(self) -> bool:
        """Whether it has that value still, with the same in it."""
        home = self.home
        now = _inside(home, self.name) if isinstance(home, CellType | FunctionType) else home.get(self.name, _ABSENT)
        if now is self.value:
            return self.inside is None or bool(contents(now) == self.inside)
        return is_simple(now) and is_simple(self.value) and bool(contents(now) == contents(self.value))


def class_with_forward(module: nn.Module) -> type | None:
    """The class that the user wrote the module's forward in."""
    functions = ((base, vars(base).get("forward")) for base in type(module).__mro__)
    return next((base for base, f in functions if isinstance(f, FunctionType) and _root(f.__globals__) != "bnrestructure"), None)


def variables_of(modules: Iterable[nn.Module], values: Iterable[Any]) -> list[Variable]:
    """What the forwards of these modules find around them, and what these values do: functions, methods, objects."""
    survey = _Survey()
    for home in dict.fromkeys(map(class_with_forward, modules)):
        if home is not None:
            survey.watch_forward(home)
    survey.look_into(*values)
    return survey.finish()


class _Survey:
    """Functions that may be called, the names that they spell, and what has something of these names."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], Variable] = {}
        self._names: set[str] = set()
        self._holders: list[Mapping[str, Any]] = []
        self._objects: list[tuple[dict[str, Any], set[str]]] = []  # an object's attributes, and those that its classes have
        self._classes: dict[type, Mapping[str, Any]] = {}
        self._held: set[type] = set()
        self._seen: dict[int, Any] = {}  # by identity; kept alive, so that nothing else gets it
        self._left: list[Any] = []

    def watch_forward(self, home: type) -> None:
        """What this class has for its forward."""
        self._add("forward", self._of_class(home), vars(home)["forward"])

    def look_into(self, *values: Any) -> None:
        """What these values find around themselves counts, too."""
        for value in values:
            if not is_simple(value) and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._left.append(value)

    def finish(self) -> list[Variable]:
        """All variables. A name may be found in what another one led to, and lead to more names."""
        before: int | None = None
        while self._left or before != len(self._names) + len(self._holders):
            while self._left:
                self._look_into(self._left.pop())
            before = len(self._names) + len(self._holders)
            for home in list(self._holders):
                for name in [name for name in self._names if name in home]:
                    self._add(name, home, home[name])
            for attributes, of_class in self._objects:
                for name in self._names & of_class:
                    self._add(name, attributes, attributes.get(name, _ABSENT))
        return list(self._found.values())

    def _add(self, name: str, home: _Home, value: Any) -> None:
        fixed = isinstance(value, ModuleType) and _root(vars(value)) in _LIBRARIES
        if not fixed and (id(home), name) not in self._found:
            inside = contents(value) if _is_compared_whole(value) else None
            self._found[id(home), name] = Variable(name, home, value, inside)
            self.look_into(value)

    def _look_into(self, value: Any) -> None:
        if isinstance(value, FunctionType):
            self._read(value)
        elif isinstance(value, MethodType | staticmethod | classmethod):
            self.look_into(value.__func__, getattr(value, "__self__", None))
        elif isinstance(value, property):
            self.look_into(value.fget)
        elif isinstance(value, functools.cached_property):
            self.look_into(value.func)
        elif isinstance(value, functools.partial):
            self.look_into(value.func, *value.args, *value.keywords.values())
        elif isinstance(value, ModuleType):
            if _is_the_users(vars(value)):
                self._holders.append(vars(value))
        elif isinstance(value, type):
            if not issubclass(value, nn.Module | Tensor):
                self._hold(value)
        elif isinstance(value, _CONTAINERS):
            if len(value) <= _FEW:
                self.look_into(*(value.values() if isinstance(value, dict) else value))
        elif is_plain_object(value) and (self._hold(type(value)) or isinstance(value, _NAMESPACES)):
            attributes = getattr(value, "__dict__", None)
            if attributes is not None:
                self._holders.append(attributes)
                self._objects.append((attributes, {name for base in type(value).__mro__ for name in vars(base)}))
        elif isinstance(value, _CACHED):
            self.look_into(value.__wrapped__)

    def _read(self, function: FunctionType) -> None:
        """What a function names, the names that it spells, its defaults; of one of an installed package numbers and flags alone."""
        values = function.__globals__
        if _root(values) in _LIBRARIES:
            return
        is_the_users = _is_the_users(values)
        for code in _codes(function.__code__):
            spelt, stored = _spelt(code)
            for name in [name for name in spelt if name in values]:
                if is_simple(values[name]) or (is_the_users and name not in stored):
                    self._add(name, values, values[name])
                self.look_into(values[name])
            if is_the_users:
                self._names |= spelt
                self.look_into(*filter(None, map(sys.modules.get, {*spelt, *code.co_names})))  # imported inside
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._add(name, cell, _inside(cell, name))
        for name in ("__defaults__", "__kwdefaults__"):
            if is_the_users and getattr(function, name):
                self._add(name, function, getattr(function, name))

    def _of_class(self, kind: type) -> Mapping[str, Any]:
        return self._classes.setdefault(kind, vars(kind))

    def _hold(self, kind: type) -> bool:
        """Look for names in the classes that a user wrote, of this one's, and at what Python calls unspelt; whether there are any."""
        own = [base for base in kind.__mro__ if _is_the_users(vars(sys.modules.get(base.__module__, sys)))]
        for base in own:
            if base not in self._held:
                self._holders.append(self._of_class(base))
                self.look_into(*(value for name, value in vars(base).items() if name.startswith("__") and isinstance(value, FunctionType)))
        self._held.update(own)
        return bool(own)


def _is_compared_whole(value: Any) -> bool:
    """Whether what is in this is compared, named or not: a container, an object without a dict of its own."""
    if is_simple(value):
        return False
    return isinstance(value, _CONTAINERS) or (not hasattr(value, "__dict__") and is_plain_object(value))


def _root(names: Mapping[str, Any]) -> str:
    """The package that code with these globals is in, whatever it passes itself off as."""
    return str(names.get("__name__", "")).partition(".")[0]


def _is_the_users(names: Mapping[str, Any]) -> bool:
    """Whether code with these globals is the user's, and of no library or package that was installed."""
    return _root(names) not in _LIBRARIES and not _INSTALLED.search(str(names.get("__file__", "")))


@functools.lru_cache(maxsize=4096)
def _spelt(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a code object spells, and those of them that it stores to as variables."""
    strings = (constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier())
    names = {name for name in (*code.co_names, *strings) if not name.startswith("__")}
    stored = {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    return frozenset(names), frozenset(stored)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _inside(home: CellType | FunctionType, name: str) -> Any:
    if isinstance(home, FunctionType):
        return getattr(home, name)
    try:
        return home.cell_contents
    except ValueError:  # empty
        return _ABSENT
