"""Who is calling: exporters, tracers and transforms want the module itself, whatever mode it is in."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "compiled_autograd_is_on",
    "is_recomputing",
    "operations_are_overridden",
    "parametrizations_are_cached",
    "saved_tensors_hooks",
    "wants_the_module_itself",
]

_MODES = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL]


def wants_the_module_itself() -> bool:
    """Whether calls are to be seen in PyTorch's own operations: by torch.export, torch.jit.trace, make_fx or a FakeTensorMode.

    Fused nodes know reverse-mode derivatives only, and neither torch.func's transforms nor forward-mode AD. In inference mode there is
    nothing to win.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.is_inference_mode_enabled():
        return True
    return torch.autograd.forward_ad._current_level >= 0 or any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


def operations_are_overridden() -> str | None:
    """The kind of mode that may change what operations do, or wants to see them: a default device does not, nor do this package's own."""
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []
    if any(not isinstance(m, DeviceContext) and not _is_own(m) for m in modes):
        return "TorchFunctionMode"
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    return None if all(map(_is_own, modes)) else "TorchDispatchMode"


def _is_own(mode: Any) -> bool:
    return type(mode).__module__.startswith("bnrestructure.")


def saved_tensors_hooks() -> Any:
    """The hooks that tensors saved for backward go through: (pack, unpack), or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def is_recomputing() -> bool:
    """Whether an activation checkpoint (not a reentrant one) runs a forward once more, and expects it to save what it saved before."""
    hooks = saved_tensors_hooks()
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook")


def parametrizations_are_cached() -> bool:
    """Whether this is within ``torch.nn.utils.parametrize.cached()``."""
    return bool(parametrize._cache_enabled)


def compiled_autograd_is_on() -> bool:
    """Whether backward passes are compiled, which they are in PyTorch's own operations."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.compiled_autograd_enabled
