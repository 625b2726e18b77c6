"""What hooks of a forward's parts may do: they run when a part is called, and not while the forward around it is captured.

A wrapper that collects features has hooks on the layers of a backbone, and hands out what they stored.
"""

from __future__ import annotations

import dis
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bnrestructure.capture.reach import Reach
from bnrestructure.capture.reads import Reads
from bnrestructure.capture.surroundings import surroundings_of
from bnrestructure.graph.boundaries import is_library_leaf

__all__ = ["announcing_hooks", "hooks_of", "may_change_result", "objection_to_hooks"]

#: Methods of containers, with which a lambda ends that collects something.
_RETURN_NOTHING = {"add", "append", "extend", "insert", "put", "update", "__setitem__"}
_TABLES = {"_forward_hooks", "_forward_pre_hooks"}
_REPLACING = {"register_buffer", "register_parameter", "_buffers", "_parameters", "load_state_dict"}
_SWITCHING = {"train", "eval", "requires_grad_"}
_REGISTERING = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook")


def objection_to_hooks(root: nn.Module, followed: Iterable[nn.Module], reads: Reads) -> str | None:
    """Why a captured forward would not be what it is with the hooks in this module tree: what they may write and it reads. None where
    nothing is known of such.

    ``followed`` are the modules whose forwards it is made of.
    """
    hooks = hooks_of(root)
    if not hooks:
        return None
    reach = Reach([*hooks, *(hook for of in hooks.values() for hook in of)])
    if reach.edits:
        return "a hook may change a tensor in place"
    around = surroundings_of(followed, kept=True)
    if not _TABLES.isdisjoint(around.names):
        return "its forward looks at hooks"
    name = _read_name(reach, reads) or next((v.name for v in around.variables if reach.may_write(v.home, v.name, v.value)), None)
    name = name or min(reach.stored & around.names, default=None)  # of a tensor, say
    if name is not None:
        return f"its forward reads {name!r}, which a hook may write"
    setting = next((name for m in reach.modules if is_library_leaf(m) for name in _settings(m, reach)), None)
    return None if setting is None else f"a hook may change {setting!r} of a layer"


def may_change_result(module: nn.Module) -> bool:
    """Whether a hook may give the module other arguments than its caller's, or the caller another result than the module's."""
    return any(_may_return(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))


def _may_return(hook: Any) -> bool:
    """Whether this may return anything but None; one whose code is not in Python may."""
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    if code is None:
        return True
    steps = list(dis.get_instructions(code))
    for before, step in itertools.pairwise(steps):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return True
        if step.opname == "RETURN_VALUE" and not (before.opname == "LOAD_CONST" and before.argval is None):
            methods = [s.argval for s in steps if s.opname in ("LOAD_METHOD", "LOAD_ATTR")]
            if not (before.opname.startswith("CALL") and methods and methods[-1] in _RETURN_NOTHING):
                return True
    return False


def hooks_of(root: nn.Module) -> dict[nn.Module, tuple[Callable[..., Any], ...]]:
    """What runs before and after the forwards of the modules in this tree, of those that have any hooks."""
    hooks = {m: (*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in root.modules()}
    return {m: of for m, of in hooks.items() if of}


def _read_name(reach: Reach, reads: Reads) -> str | None:
    """An attribute that the forward has read, and that may get another value."""
    return next((name for m, names in reads.names_outside.items() for name in sorted(names) if _may_write(reach, m, name)), None)


def _may_write(reach: Reach, module: nn.Module, name: str) -> bool:
    tensor = name in module._parameters or name in module._buffers
    if hasattr(type(module), name) or name in module._modules or tensor:  # not by chance, as what code may give any name to
        replaced = tensor and not _REPLACING.isdisjoint(reach.names)
        return module in reach.modules and (name in reach.stored or replaced)
    return reach.may_write(module.__dict__, name, module.__dict__.get(name))


def _settings(layer: nn.Module, reach: Reach) -> Iterator[str]:
    """What may become another one of a layer of PyTorch's: a number, a weight, a training flag."""
    tensors = {*layer._parameters, *layer._buffers}
    numbers = {name for name, value in layer.__dict__.items() if not name.startswith("_") and not isinstance(value, Tensor)}
    yield from sorted(reach.stored & (tensors | numbers))
    if tensors and not _REPLACING.isdisjoint(reach.names):
        yield min(tensors)
    if not _SWITCHING.isdisjoint(reach.names):
        yield "training"


@contextmanager
def announcing_hooks(announce: Callable[[nn.Module], None]) -> Iterator[None]:
    """Tell of each module that gets a hook within the block, before it does."""
    saved = [(name, getattr(nn.Module, name)) for name in _REGISTERING]

    def announced(register: Callable[..., Any]) -> Callable[..., Any]:
        def registering(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            announce(module)
            return register(module, *args, **kwargs)

        return registering

    for name, register in saved:
        setattr(nn.Module, name, announced(register))
    try:
        yield
    finally:
        for name, register in saved:
            setattr(nn.Module, name, register)
