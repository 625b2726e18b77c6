"""What a forward's functions find around them: globals, closures, defaults, configuration objects, classes and modules.

Nothing tells what a function reads there while it runs. So its code is asked: what it loads as a global, and the names that it spells as
attributes, of whatever it may reach (spelt_names.py). That is more than it reads. Where code puts names together while it runs, all
attributes count of whatever it may reach.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import functools
import os
import sys
import threading
import weakref
from collections import ChainMap, UserDict, UserList
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from multiprocessing.sharedctypes import SynchronizedBase
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bnrestructure.capture.authors import LIBRARIES, attributes_of_module, is_by_user, is_class_by_user, package_of, package_of_forward
from bnrestructure.capture.contents import attributes_of, behind, contents, goes_on, is_plain_object, is_proxy, is_simple, length_of
from bnrestructure.capture.raw_memory import memory_of
from bnrestructure.capture.spelt_names import Spelt, codes, spelt_names

__all__ = ["Found", "Missing", "Variable", "surroundings_of"]

_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_WRAPPERS = (
    UserDict, UserList, ChainMap, threading.Event, SynchronizedBase, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary
)  # fmt: skip
_CACHED = type(functools.cache(len))
_FEW = 200  # items of a container that are looked into for functions and objects
#: What has run before a forward does.
_AT_THE_START = {"__init__", "__new__", "__post_init__", "__init_subclass__"}
#: The value of a variable that is not there.
ABSENT = object()
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
        if isinstance(home, CellType):
            return _in_cell(home)
        return home.get(ABSENT) if isinstance(home, ContextVar) else getattr(home, self.name)

    def is_as_it_was(self) -> bool:
        """Whether it has that value still, with the same in it."""
        now = self.now()
        if self.inside is not None:
            return bool(contents(now) == self.inside)
        return now is self.value or (is_simple(now) and is_simple(self.value) and bool(contents(now) == contents(self.value)))

    def put_back(self) -> None:
        """Give it the value that it had."""
        home = self.home
        if self.now() is self.value:
            return
        if isinstance(home, dict | threading.local):
            values = home if isinstance(home, dict) else vars(home)
            if self.value is ABSENT:
                values.pop(self.name, None)
            else:
                values[self.name] = self.value
        elif isinstance(home, CellType):
            if self.value is ABSENT:
                del home.cell_contents
            else:
                home.cell_contents = self.value
        elif not isinstance(home, ContextVar):  # a capture has a context of its own, which goes with it
            setattr(home, self.name, self.value)


class Missing(NamedTuple):
    """Names that code spells, and that something it may reach does not have."""

    home: dict[str, Any] | type | threading.local
    names: frozenset[str]

    @property
    def name(self) -> str:
        """One that is there by now."""
        return next(iter(self.names & _values_of(self.home).keys()), "")

    def is_as_it_was(self) -> bool:
        """Whether they are missing still."""
        return self.names.isdisjoint(_values_of(self.home))

    def put_back(self) -> None:
        """Take away those that are there."""
        for name in self.names & _values_of(self.home).keys():
            if isinstance(self.home, dict):
                del self.home[name]
            else:
                delattr(self.home, name)


class Found(NamedTuple):
    """What code names, and what it does not find; the caches that it goes through; iterators, and generators of random numbers.

    names      of attributes, that it spells
    asking     the globals of code that names ``type``
    catches    whether code may catch what operations raise
    """

    variables: list[Variable]
    missing: list[Missing]
    caches: list[Any]
    going_on: list[Any]
    asking: list[dict[str, Any]]
    catches: bool
    names: frozenset[str]


def surroundings_of(modules: Iterable[nn.Module], values: Iterable[Any] = (), *, kept: bool = False) -> Found:
    """What the forwards of these modules, and the methods that those name, find around them; and what these functions and objects do.

    kept    and what the modules' own attributes of the names that are spelt do: functions, objects
    """
    survey = _Survey()
    for module in modules:
        survey.follow_forward(type(module))
        if kept:
            survey.instances.append(vars(module))
    survey.look_into(*values)
    return survey.finish()


class _Survey:
    """Functions that may be called, the names that they spell, and what has something of these names."""

    def __init__(self) -> None:
        self.instances: list[dict[str, Any]] = []
        self._found: dict[tuple[int, str], Variable] = {}
        self._names: set[str] = {"forward"}
        self._any_name = False
        self._holders: list[dict[str, Any] | type | threading.local] = []
        self._classes: set[type] = set()
        self._of_objects: set[FunctionType] = set()  # methods of other classes than modules'
        self._caches: list[Any] = []
        self._going_on: list[Any] = []
        self._asking: dict[int, dict[str, Any]] = {}
        self._catches = False
        self._seen: dict[int, Any] = {}  # by identity; kept alive, so that nothing else gets it
        self._left: list[Any] = []

    def follow_forward(self, kind: type) -> None:
        """A module of this class runs its forward, and the methods that it names."""
        if kind not in self._classes:
            self._hold([base for base in kind.__mro__ if base not in nn.Module.__mro__])
            home = next((base for base in kind.__mro__ if "forward" in vars(base) and package_of_forward(base) != "bnrestructure"), None)
            if home is not None:
                self._add("forward", home, vars(home)["forward"])

    def look_into(self, *values: Any) -> None:
        """What these values find around themselves counts, too."""
        for value in values:
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._left.append(value)

    def finish(self) -> Found:
        """All there is. A name may be found in what another one led to, and lead to more names."""
        before = None
        while self._left or before != self._known():
            while self._left:
                with contextlib.suppress(Exception):  # whatever a user's object does when it is asked what it is
                    self._look_into(self._left.pop())
            before = self._known()
            for home in list(self._holders):
                values = _values_of(home)
                for name in [name for name in (values if self._any_name else self._names) if name in values and not _is_special(name)]:
                    self._add(name, home, values[name])
            for attributes in self.instances:
                self.look_into(*[attributes[name] for name in self._names if name in attributes])
            if "get_last_lr" in self._names:
                self._names.add("_last_lr")
        # A capture puts a ``type`` among the globals of code that asks (kinds.py).
        missing = [Missing(home, frozenset(self._names - _values_of(home).keys() - {"type"})) for home in self._holders]
        asking, names = list(self._asking.values()), frozenset(self._names)
        return Found(list(self._found.values()), missing, self._caches, self._going_on, asking, self._catches, names)

    def _known(self) -> tuple[int, int, bool]:
        return len(self._names), len(self._holders), self._any_name

    def _add(self, name: str, home: Home, value: Any) -> None:
        fixed = isinstance(value, ModuleType) and package_of(attributes_of_module(value)) in LIBRARIES
        if not fixed and (id(home), name) not in self._found:
            inside = None
            with contextlib.suppress(Exception):  # likewise
                inside = contents(value) if _is_compared_whole(value) else None
            self._found[id(home), name] = Variable(name, home, value, inside)
            if isinstance(value, FunctionType) and isinstance(home, type) and not issubclass(home, nn.Module):
                self._of_objects.add(value)
            self.look_into(value)

    def _look_into(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._hold_one(vars(value))
        elif is_simple(value) or isinstance(value, nn.Module):
            return
        elif goes_on(value):
            self._going_on.append(value)
        elif isinstance(value, FunctionType):
            self._read(value)
        elif isinstance(value, BuiltinMethodType):
            if not isinstance(value.__self__, ModuleType | type):
                self._add(value.__name__, {value.__name__: value.__self__}, value.__self__)
        elif isinstance(value, ModuleType):
            if is_by_user(attributes_of_module(value)):
                self._hold_one(attributes_of_module(value))
        elif isinstance(value, type):
            self._hold(value.__mro__)
        elif length_of(value) is not None:
            if (length_of(value) or 0) <= _FEW:
                self.look_into(*(dict.values(value) if isinstance(value, dict) else value))
            if (attributes := attributes_of(value)) is not None:
                self._hold(type(value).__mro__)
                self._hold_one(attributes)
        elif isinstance(value, ContextVar):
            self._add(value.name, value, value.get(ABSENT))
        elif isinstance(value, threading.local):
            self._hold_one(value)
        elif isinstance(value, _CACHED):
            self._caches.append(value)
            self.look_into(value.__wrapped__)
        elif isinstance(value, Optimizer | LRScheduler):
            self._hold_one(vars(value))
            self.look_into(getattr(value, "optimizer", None))
        elif not self._look_behind(value) and is_plain_object(value):
            own = self._hold(type(value).__mro__)
            attributes = getattr(value, "__dict__", None)
            if attributes is not None and (own or isinstance(value, _NAMESPACES)):
                self._hold_one(attributes)

    def _look_behind(self, value: Any) -> bool:
        """Look into the functions that a method or a descriptor stands for; whether this is one."""
        if isinstance(value, MethodType | staticmethod | classmethod):
            self.look_into(value.__func__, getattr(value, "__self__", None))
        elif isinstance(value, property):
            self.look_into(value.fget)
        elif isinstance(value, functools.cached_property):
            self.look_into(value.func)
        elif isinstance(value, functools.partial | functools.partialmethod):
            self.look_into(value.func, *value.args, *value.keywords.values())
        elif isinstance(value, functools.singledispatchmethod):
            self.look_into(value.dispatcher, value.func)
        elif isinstance(value, weakref.ref):
            self.look_into(value())
        elif is_proxy(value):
            self.look_into(behind(value))
        else:
            return False
        return True

    def _read(self, function: FunctionType) -> None:
        """What a function names, the names that it spells, its defaults; of one of an installed package numbers and flags alone.

        A library's may stand before a user's: a context manager's, what torch.no_grad() makes of a function.
        """
        values = function.__globals__
        cells = list(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if package_of(values) in LIBRARIES:
            self.look_into(getattr(function, "__wrapped__", None), *[_in_cell(cell) for _, cell in cells])
            return
        by_user = is_by_user(values)
        for code in codes(function.__code__):
            named = spelt_names(code)
            self._catches |= named.catches
            if "type" in named.variables:
                self._asking[id(values)] = values
            for name in [name for name in _variables_of(named, values, by_user) if name in values]:
                if by_user or is_simple(values[name]):
                    self._add(name, values, values[name])
                self.look_into(values[name])
            for name in named.variables - values.keys():
                if not hasattr(builtins, name):
                    self._add(name, values, ABSENT)
            if "environ" in named.attributes or "getenv" in named.attributes | named.variables:
                self._add("environ", vars(os), os.environ)
            if by_user:
                self._any_name |= named.any_attribute or (named.any_own and function in self._of_objects)
                self._names |= named.attributes
                package = str(values.get("__package__"))
                paths = [*named.imported, *(f"{package}.{name}".rstrip(".") for name in named.imported)]
                self.look_into(*[module for path in paths if (module := sys.modules.get(path)) is not None])
        for name, cell in cells:
            self._add(name, cell, _in_cell(cell))
        if by_user:
            self._hold_one(vars(function))
            for name in ("__defaults__", "__kwdefaults__"):
                if getattr(function, name):
                    self._add(name, function, getattr(function, name))

    def _hold(self, classes: Iterable[type]) -> bool:
        """Look for names in those of these classes that a user wrote, and at what Python calls unspelt; whether there are any."""
        own = [base for base in classes if is_class_by_user(base)]
        for base in [base for base in own if base not in self._classes]:
            self._classes.add(base)
            self._hold_one(base)
            unspelt = [name for name in vars(base) if name.startswith("__") and name not in _AT_THE_START]
            methods = [vars(base)[name] for name in unspelt if isinstance(vars(base)[name], FunctionType)]
            self._of_objects.update(methods if not issubclass(base, nn.Module) else ())
            self.look_into(*methods)
        return bool(own)

    def _hold_one(self, home: dict[str, Any] | type | threading.local) -> None:
        if all(home is not held for held in self._holders):
            self._holders.append(home)


def _is_compared_whole(value: Any) -> bool:
    """Whether what is in this is compared, named or not: a container, an array, an object without a dict of its own."""
    if is_simple(value):
        return False
    if length_of(value) is not None or memory_of(value) is not None or value is os.environ or isinstance(value, _WRAPPERS):
        return True
    return not hasattr(value, "__dict__") and is_plain_object(value)


def _in_cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return ABSENT


def _values_of(home: dict[str, Any] | type | threading.local) -> Mapping[str, Any]:
    return home if isinstance(home, dict) else vars(home)


def _is_special(name: str) -> bool:
    """Whether Python has a meaning of its own for this name."""
    return name.startswith("__")


def _variables_of(named: Spelt, values: Mapping[str, Any], by_user: bool) -> Iterable[str]:
    """The global variables that code may read: those that it names, or all of them but for tensors and modules."""
    if not (named.any_variable and by_user):
        return named.variables
    return [n for n, value in values.items() if not _is_special(n) and (n in named.variables or not isinstance(value, Tensor | nn.Module))]
