"""What code can get hold of, and write to: from some functions and objects on, the functions that they may run, and all that these name.

Nothing runs. A name counts wherever it leads to: code that spells ``store`` may mean any attribute of that name that it can get hold of.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnrestructure.capture.authors import LIBRARIES, attributes_of_module, package_of
from bnrestructure.capture.contents import behind, is_proxy, is_simple, parts_of
from bnrestructure.capture.spelt_names import codes, spelt_names

__all__ = ["Reach", "reach_of_part"]

#: What finds or gives attributes, or variables, of any name.
_ANY_NAME = {"__dict__", "vars", "globals", "exec", "eval"}
_GIVES_BY_NAME = {"setattr", "__setattr__"}
_ALL_MODULES = {"modules", "named_modules", "children", "named_children", "apply"}
#: What cannot change, whatever is in it.
_FIXED = (tuple, frozenset, MethodType, functools.partial)
_MANY_MODULES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: So many objects are looked at, and so many items of a container.
_MOST, _MOST_ITEMS = 5000, 1000


class _Stores(NamedTuple):
    """What a piece of code gives values to: attributes and variables by name, or attributes of any name; whether it may edit a tensor."""

    attributes: frozenset[str]
    variables: frozenset[str]
    any_name: bool
    edits: bool


@functools.lru_cache(maxsize=1024)
def _stores(code: CodeType) -> _Stores:
    steps, spelt = list(dis.get_instructions(code)), spelt_names(code)
    by_step: dict[str, set[str]] = {}
    for step in steps:
        by_step.setdefault(step.opname, set()).add(str(step.argval))
    attributes = by_step.get("STORE_ATTR", set()) | by_step.get("DELETE_ATTR", set())
    by_name = not _GIVES_BY_NAME.isdisjoint(code.co_names)
    if by_name:
        attributes |= {constant for constant in code.co_consts if isinstance(constant, str)}
    any_name = not _ANY_NAME.isdisjoint(code.co_names) or (by_name and (spelt.any_attribute or spelt.any_own))
    variables = by_step.get("STORE_GLOBAL", set()) | by_step.get("STORE_DEREF", set())
    return _Stores(frozenset(attributes), frozenset(variables), any_name, _edits(code, steps))


def _edits(code: CodeType, steps: list[dis.Instruction]) -> bool:
    """Whether code may change a tensor in place: by a method, an argument, an operator, or an assignment to a part of it."""
    methods = any(name.endswith("_") and not name.startswith("_") for name in code.co_names)
    arguments = any(isinstance(names, tuple) and not {"out", "inplace"}.isdisjoint(names) for names in code.co_consts)
    return methods or arguments or any(_edits_at(steps, i) for i in range(len(steps)))


def _edits_at(steps: list[dis.Instruction], i: int) -> bool:
    step, before = steps[i], steps[max(0, i - 2) : i]
    if step.opname == "STORE_SLICE" or (step.opname == "STORE_ATTR" and step.argval == "data"):
        return True
    if step.opname == "STORE_SUBSCR" and before:  # a name or a text as the key is one of a dict's
        last = before[-1]
        built = last.opname in ("BUILD_SLICE", "BUILD_TUPLE") or (last.opname == "LOAD_CONST" and not isinstance(last.argval, str))
        return built or all(b.opname.startswith("LOAD_FAST") for b in before)
    in_place = step.opname.startswith("INPLACE_") or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
    return in_place and not steps[i + 1].opname.startswith(("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "SWAP"))


class Reach:
    """All that ``values`` can get hold of.

    modules     modules; of what they have, only what code names
    objects     containers and other objects that may change, by identity; ``bound``, those that methods written in C belong to
    homes       where names may be given a value: namespaces of Python modules, classes, attributes of objects; by identity
    stored      the names that code gives values to, as attributes; ``any_name``: or any
    variables   the global variables and those of closures that it gives values to: (identity of the globals or the cell, name)
    names       the names of attributes that code spells
    edits       whether code, but for PyTorch's own, may change a tensor in place
    complete    whether all was looked at: of many thousands of objects no more are
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.modules: set[nn.Module] = set()
        self.objects: dict[int, Any] = {}
        self.bound: dict[int, Any] = {}
        self.homes: set[int] = set()
        self.stored: set[str] = set()
        self.variables: set[tuple[int, str]] = set()
        self.any_name = self.edits = False
        self.names: set[str] = {"__call__"}
        self._holders: dict[int, Mapping[str, Any]] = {}  # what names are looked up in, by the identity of whose they are
        self._seen: dict[int, Any] = {}  # by identity; kept alive, so that nothing else gets it
        self._left, self._looked_at = list(values), 0
        while self._left and self.complete:
            while self._left and self.complete:
                with contextlib.suppress(Exception):  # whatever a user's object does when it is asked what it is
                    self._look_at(self._left.pop())
            self._left = [value for value in self._named() if id(value) not in self._seen]

    def _named(self) -> Iterator[Any]:
        """What has one of the names so far: one may lead to more names."""
        for holder in list(self._holders.values()):
            yield from [holder[name] for name in self.names & holder.keys()]
        if not _ALL_MODULES.isdisjoint(self.names):
            for module in list(self.modules):
                yield from module.modules()

    @property
    def complete(self) -> bool:
        """Whether all was looked at."""
        return self._looked_at <= _MOST

    def may_write(self, home: object, name: str, value: object) -> bool:
        """Whether code may give another value to what has this name in ``home``, or change what is in its value."""
        if not self.complete or (id(home), name) in self.variables or (id(home) in self.homes and (self.any_name or name in self.stored)):
            return True
        return not self.objects.keys().isdisjoint(Reach([value]).objects)

    def _look_at(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if is_proxy(value):
            value = behind(value)
        if is_simple(value) or isinstance(value, Tensor):
            return
        self._looked_at += 1
        if isinstance(value, torch.jit.ScriptModule):
            self.modules.add(value)
        elif isinstance(value, nn.Module):
            self._look_at_module(value)
        elif isinstance(value, FunctionType):
            self._look_at_function(value)
        elif isinstance(value, BuiltinMethodType | MethodWrapperType):
            self.bound[id(value.__self__)] = value.__self__
            self._left.append(value.__self__)
        elif isinstance(value, staticmethod | classmethod):
            self._left.append(value.__func__)
        elif isinstance(value, property):
            self._left += [value.fget, value.fset]
        elif isinstance(value, weakref.ref):
            self._left.append(value())
        elif isinstance(value, ModuleType):
            if package_of(attributes_of_module(value)) not in LIBRARIES:
                self._hold(value, attributes_of_module(value))
        elif isinstance(value, type):
            self._hold_classes(value)
        elif not type(value).__module__.startswith("logging"):  # loggers are everybody's
            self._look_at_object(value)

    def _look_at_module(self, module: nn.Module) -> None:
        self.modules.add(module)
        self._hold(module.__dict__, module.__dict__)
        self._hold(module._modules, module._modules)
        self._hold_classes(type(module))
        if isinstance(module, _MANY_MODULES):
            self._left += module._modules.values()

    def _look_at_function(self, function: FunctionType) -> None:
        values = function.__globals__
        followed = package_of(values) not in LIBRARIES
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for code in codes(function.__code__):
            stores, spelt = _stores(code), spelt_names(code)
            self.stored |= stores.attributes
            self.any_name |= stores.any_name
            self.edits |= followed and stores.edits
            self.names |= spelt.attributes
            self.variables |= {(id(cells.get(name, values)), name) for name in stores.variables}
            if followed:
                self._left += [values[name] for name in spelt.variables if name in values]
        self._left += [cell.cell_contents for cell in cells.values() if _is_filled(cell)]
        self._left += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        self._look_at_attributes(function)

    def _look_at_object(self, value: Any) -> None:
        """A container, a method, or an object of somebody's class."""
        parts = parts_of(value)
        self._left += list((parts or {}).values())[:_MOST_ITEMS]
        if not isinstance(value, _FIXED):
            self.objects[id(value)] = value
        self._look_at_attributes(value)
        self._hold_classes(type(value))

    def _look_at_attributes(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self.homes.add(id(attributes))
            self._left += attributes.values()

    def _hold_classes(self, kind: type) -> None:
        for base in kind.__mro__:
            if str(base.__module__).partition(".")[0] not in LIBRARIES:
                self._hold(base, vars(base))

    def _hold(self, home: object, names: Mapping[str, Any]) -> None:
        """Look for names here, in ``home``, which is the dict itself, a class or a Python module."""
        self.homes |= {id(home), id(names)}
        self._holders.setdefault(id(home), names)


def reach_of_part(part: nn.Module) -> Reach:
    """What the forward of a part of a model can get hold of. Of one that TorchScript has compiled, nothing but itself."""
    return Reach([part] if isinstance(part, torch.jit.ScriptModule) else [type(part).forward, part])


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (it raises where the variable has no value yet)
    except ValueError:
        return False
    return True
