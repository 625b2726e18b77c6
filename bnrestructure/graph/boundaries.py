"""Modules that capture must call as they are, because something outside their forward() runs when they are called."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

__all__ = [
    "REPLACED",
    "any_global_hooks",
    "boundary_reason",
    "has_hooks",
    "has_own_call",
    "has_scripts",
    "is_called",
    "is_library_leaf",
]

#: Methods that somebody may put on an instance in the place of its class's: a convolution's forward goes through the second.
REPLACED = frozenset({"forward", "_conv_forward"})


def has_hooks(state: dict[str, object]) -> bool:
    """Whether a module's ``__dict__`` holds any hook that calling it would run."""
    return bool(
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
    )


def any_global_hooks() -> bool:
    """Whether hooks for *every* module are installed (``register_module_forward_hook`` and kin): then nothing may be inlined."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def boundary_reason(module: nn.Module) -> str | None:
    """Why this module must stay a call of its own in a captured graph, or None when its forward() may be traced through."""
    if has_hooks(module.__dict__):
        return "it has hooks"
    if not REPLACED.isdisjoint(module.__dict__):
        return "its forward is replaced on the instance"
    if type(module).__module__.startswith("torch.") and not _is_pytorchs(type(module).forward):
        return "its class's forward is replaced"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule"
    if module._compiled_call_impl is not None or isinstance(module, OptimizedModule):
        return "it is compiled (torch.compile)"
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return f"it is a {type(module).__name__}"
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        return "FSDP manages its parameters"
    return None


def has_own_call(kind: type) -> bool:
    """Whether calling a module of this class does more than PyTorch's ``__call__``, which is what the tracer sees."""
    return next(base for base in kind.__mro__ if "__call__" in vars(base)) is not nn.Module


def has_scripts(module: nn.Module) -> bool:
    """Whether a part of this module is compiled by TorchScript, if not all of it."""
    return any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())


def _is_pytorchs(function: Any) -> bool:
    """Whether PyTorch wrote it, or a generated class (capture/swap.py) has it in its place."""
    return str(getattr(function, "__globals__", {}).get("__name__", "torch")).partition(".")[0] in ("torch", "bnrestructure")


def is_called(module: nn.Module) -> bool:
    """Whether anybody can call this module: a ModuleList, a ModuleDict or a bare nn.Module only holds others."""
    own = "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule)
    return own or type(module).forward is not nn.Module.forward


def is_library_leaf(module: nn.Module) -> bool:
    """Whether this is one of torch's own layers, whose forward() is not traced through (containers' are, or they have none)."""
    name = type(module).__module__
    own = name.startswith(("torch.nn", "torch.ao.nn", "torch.ao.quantization"))
    return own and not isinstance(module, nn.Sequential) and is_called(module)
