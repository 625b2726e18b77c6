"""What hooks of a forward's parts may write: they run when a part is called, and not while the forward around it is captured.

A wrapper that collects features has hooks on the layers of a backbone, and hands out what they stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bnrestructure.capture.reach import Reach
from bnrestructure.capture.reads import Reads
from bnrestructure.capture.surroundings import surroundings_of

__all__ = ["hooks_of", "stored_by_hooks"]


def stored_by_hooks(root: nn.Module, followed: Iterable[nn.Module], reads: Reads) -> str | None:
    """An attribute or a variable that the captured forward reads and that a hook in this module tree may write; None where there is none.

    ``followed`` are the modules whose forwards it is made of.
    """
    hooks = hooks_of(root)
    if not hooks:
        return None
    reach = Reach([*hooks, *(hook for of in hooks.values() for hook in of)])
    for module, names in reads.names_outside.items():
        for name in sorted(names):
            if _may_write(reach, module, name):
                return name
    variables = surroundings_of(followed, kept=True).variables
    return next((v.name for v in variables if reach.may_write(v.home, v.name, v.value)), None)


def hooks_of(root: nn.Module) -> dict[nn.Module, tuple[Callable[..., Any], ...]]:
    """What runs before and after the forwards of the modules in this tree, of those that have any hooks."""
    hooks = {m: (*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in root.modules()}
    return {m: of for m, of in hooks.items() if of}


def _may_write(reach: Reach, module: nn.Module, name: str) -> bool:
    if hasattr(type(module), name) or any(name in held for held in (module._modules, module._parameters, module._buffers)):
        return module in reach.modules and name in reach.stored  # not by chance, as what code may give any name to
    return reach.may_write(module.__dict__, name, module.__dict__.get(name))
