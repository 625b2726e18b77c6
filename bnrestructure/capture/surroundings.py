"""What a forward's functions find around them: globals, closures, defaults, configuration objects, classes and modules.

Nothing tells what a function reads there while it runs. So its code is asked: a name that it spells, as a variable, an attribute or a
string, may be read. That is more than it reads; what is missing are names that are put together while it runs.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from bnrestructure.capture.contents import contents, is_plain_object, is_simple

__all__ = ["Found", "Variable", "surroundings_of"]

#: Whose code decides by nothing that a user would change between two steps.
_LIBRARIES = frozenset({"torch", "numpy", "bnrestructure", *sys.stdlib_module_names})
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_CACHED = type(functools.cache(len))
_MARK = "_bnr_original"  # of the generated classes (capture/swap.py)
#: The value of a variable that is not there.
ABSENT = object()
_CONTAINERS = (dict, list, tuple, set, frozenset)
_INSTALLED = re.compile(r"[/\\\\](site|dist)-packages[/\\\\]")
_FEW = 20  # items of a container that are looked into for functions and objects
#: Where a variable is: globals, the attributes of an object or a module; a class; what each thread has; a closure's cell; a function, for
#: its defaults; a context's variable, which is by itself.
Home = dict[str, Any] | type | threading.local | CellType | FunctionType | ContextVar[Any]


class Variable(NamedTuple):
    """A name in ``home``, its value, and what is in that where it is compared whole."""

    name: str
    home: Home
    value: Any
    inside: Any

    def now(self) -> Any:
        """The value that it has now, or ABSENT."""
        home = self.home
        if isinstance(home, dict):
            return home.get(self.name, ABSENT)
        if isinstance(home, type | threading.local):
            return vars(home).get(self.name, ABSENT)
        if isinstance(home, FunctionType):
            return getattr(home, self.name)
        if isinstance(home, ContextVar):
            return home.get(ABSENT)
        try:
            return home.cell_contents
        except ValueError:  # empty
            return ABSENT

    def is_as_it_was(self) -> bool:
        """Whether it has that value still, with the same in it."""
        now = self.now()
        if now is self.value:
            return self.inside is None or bool(contents(now) == self.inside)
        return is_simple(now) and is_simple(self.value) and bool(contents(now) == contents(self.value))

    def put_back(self) -> None:
        """Give it the value that it had."""
        home = self.home
        if isinstance(home, dict | threading.local):
            values = home if isinstance(home, dict) else vars(home)
            if self.value is ABSENT:
                values.pop(self.name, None)
            else:
                values[self.name] = self.value
        elif isinstance(home, CellType):
            home.cell_contents = self.value
        elif isinstance(home, ContextVar):
            home.set(self.value)
        else:
            setattr(home, self.name, self.value)


class Found(NamedTuple):
    """The variables that code names, and the caches that it goes through."""

    variables: list[Variable]
    caches: list[Any]


def surroundings_of(modules: Iterable[nn.Module], values: Iterable[Any] = ()) -> Found:
    """What the forwards of these modules, and the methods that those name, find around them; and what these functions and objects do."""
    survey = _Survey()
    for kind in dict.fromkeys(map(type, modules)):
        survey.follow_forward(kind)
    survey.look_into(*values)
    return survey.finish()


class _Survey:
    """Functions that may be called, the names that they spell, and what has something of these names."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], Variable] = {}
        self._names: set[str] = set()
        self._holders: list[tuple[Home, Mapping[str, Any]]] = []
        self._objects: list[tuple[dict[str, Any], set[str]]] = []  # an object's attributes, and those that its classes have
        self._classes: set[type] = set()
        self._caches: list[Any] = []
        self._seen: dict[int, Any] = {}  # by identity; kept alive, so that nothing else gets it
        self._left: list[Any] = []

    def follow_forward(self, kind: type) -> None:
        """A module of this class runs its forward, and the methods that it names."""
        own = [base for base in kind.__mro__ if _MARK not in vars(base)]
        home = next((base for base in own if "forward" in vars(base)), None)
        if home is not None:
            self._add("forward", home, vars(home)["forward"])
        self._hold([base for base in own if base not in nn.Module.__mro__])

    def look_into(self, *values: Any) -> None:
        """What these values find around themselves counts, too."""
        for value in values:
            if not is_simple(value) and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._left.append(value)

    def finish(self) -> Found:
        """All variables. A name may be found in what another one led to, and lead to more names."""
        before: int | None = None
        while self._left or before != len(self._names) + len(self._holders):
            while self._left:
                self._look_into(self._left.pop())
            before = len(self._names) + len(self._holders)
            for home, values in list(self._holders):
                for name in [name for name in self._names if name in values]:
                    self._add(name, home, values[name])
            for attributes, of_class in self._objects:
                for name in self._names & of_class:
                    self._add(name, attributes, attributes.get(name, ABSENT))
        return Found(list(self._found.values()), self._caches)

    def _add(self, name: str, home: Home, value: Any) -> None:
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
                self._holders.append((vars(value), vars(value)))
        elif isinstance(value, type):
            if not issubclass(value, nn.Module | Tensor):
                self._hold(value.__mro__, unspelt=True)
        elif isinstance(value, _CONTAINERS):
            if len(value) <= _FEW:
                self.look_into(*(value.values() if isinstance(value, dict) else value))
        elif isinstance(value, ContextVar):
            self._add(value.name, value, value.get(ABSENT))
        elif isinstance(value, threading.local):
            self._holders.append((value, vars(value)))
        elif isinstance(value, _CACHED):
            self._caches.append(value)
            self.look_into(value.__wrapped__)
        elif is_plain_object(value) and (self._hold(type(value).__mro__, unspelt=True) or isinstance(value, _NAMESPACES)):
            attributes = getattr(value, "__dict__", None)
            if attributes is not None:
                self._holders.append((attributes, attributes))
                self._objects.append((attributes, {name for base in type(value).__mro__ for name in vars(base)}))

    def _read(self, function: FunctionType) -> None:
        """What a function names, the names that it spells, its defaults; of one of an installed package numbers and flags alone."""
        values = function.__globals__
        if _root(values) in _LIBRARIES:
            return
        is_the_users = _is_the_users(values)
        if any("environ" in code.co_names or "getenv" in code.co_names for code in _codes(function.__code__)):
            self._add("environ", vars(os), os.environ)
        for code in _codes(function.__code__):
            spelt = _spelt(code)
            for name in [name for name in spelt if name in values]:
                if is_the_users or is_simple(values[name]):
                    self._add(name, values, values[name])
                self.look_into(values[name])
            if is_the_users:
                self._names |= spelt
                self.look_into(*filter(None, map(sys.modules.get, {*spelt, *code.co_names})))  # imported inside
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._add(name, cell, Variable(name, cell, None, None).now())
        for name in ("__defaults__", "__kwdefaults__"):
            if is_the_users and getattr(function, name):
                self._add(name, function, getattr(function, name))

    def _hold(self, classes: Iterable[type], unspelt: bool = False) -> bool:
        """Look for names in those of these classes that a user wrote, and at what Python calls ``unspelt``; whether there are any."""
        own = [base for base in classes if _is_the_users(vars(sys.modules.get(base.__module__, sys)))]
        for base in [base for base in own if base not in self._classes]:
            self._classes.add(base)
            self._holders.append((base, vars(base)))
            if unspelt:
                self.look_into(*(value for name, value in vars(base).items() if name.startswith("__") and isinstance(value, FunctionType)))
        return bool(own)


def _is_compared_whole(value: Any) -> bool:
    """Whether what is in this is compared, named or not: a container, an object without a dict of its own."""
    if is_simple(value):
        return False
    return isinstance(value, _CONTAINERS) or value is os.environ or (not hasattr(value, "__dict__") and is_plain_object(value))


def _root(names: Mapping[str, Any]) -> str:
    """The package that code with these globals is in, whatever it passes itself off as."""
    return str(names.get("__name__", "")).partition(".")[0]


def _is_the_users(names: Mapping[str, Any]) -> bool:
    """Whether code with these globals is the user's, and of no library or package that was installed."""
    return _root(names) not in _LIBRARIES and not _INSTALLED.search(str(names.get("__file__", "")))


def _spelt(code: CodeType) -> set[str]:
    """The names that a code object spells: variables, attributes, and strings that may be either."""
    strings = (constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier())
    return {name for name in (*code.co_names, *strings) if not name.startswith("__")}


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
