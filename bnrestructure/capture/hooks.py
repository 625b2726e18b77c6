"""What hooks of a forward's parts may write: they run when a part is called, and not while the forward around it is captured.

A wrapper that collects features has hooks on the layers of a backbone, and hands out what they stored.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from bnrestructure.capture.reads import Reads
from bnrestructure.capture.spelt_names import codes

__all__ = ["stored_by_hooks"]

_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


def stored_by_hooks(root: nn.Module, reads: Reads) -> str | None:
    """An attribute that the captured forward reads and that a hook in this module tree may write; None where there is none."""
    modules = set(root.modules())
    held = {id(value): (m, name) for m in modules for name, value in m.__dict__.items() if isinstance(value, _CONTAINERS)}
    for m in modules:
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()):
            for function, reached in _functions(hook):
                owner, name = held.get(id(reached), (None, ""))
                if owner is not None and name in reads.outside(owner):
                    return name
                if isinstance(reached, nn.Module) and reached in modules:
                    names = _stored(function.__code__, reached) & reads.outside(reached)
                    if names:
                        return min(names)
    return None


def _functions(hook: Any) -> Iterator[tuple[FunctionType, Any]]:
    """The functions that a hook is made of, each with every object that it has from where it was made."""
    if isinstance(hook, functools.partial):
        yield from _functions(hook.func)
        given = (*hook.args, *hook.keywords.values())
        yield from ((function, value) for function, _ in list(_functions(hook.func)) for value in given)
    elif isinstance(hook, MethodType) and isinstance(hook.__func__, FunctionType):
        yield hook.__func__, hook.__self__
        yield from _functions(hook.__func__)
    elif isinstance(hook, FunctionType):
        cells = [cell.cell_contents for cell in hook.__closure__ or () if _is_filled(cell)]
        names = [name for code in codes(hook.__code__) for name in code.co_names]
        found = [hook.__globals__[name] for name in names if name in hook.__globals__]
        yield from ((hook, value) for value in (None, *cells, *(hook.__defaults__ or ()), *found))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (it raises where the variable has no value yet)
    except ValueError:
        return False
    return True


def _stored(code: CodeType, owner: nn.Module) -> set[str]:
    """The attributes that code may give another value: those that it stores, names that it may hand to setattr, containers."""
    names: set[str] = set()
    for part in codes(code):
        steps = list(dis.get_instructions(part))
        names |= {step.argval for step in steps if step.opname == "STORE_ATTR"}
        if "setattr" in part.co_names:
            names |= {constant for constant in part.co_consts if isinstance(constant, str)}
        names |= {name for name in part.co_names if isinstance(owner.__dict__.get(name), _CONTAINERS) and not name.startswith("_")}
    return names
