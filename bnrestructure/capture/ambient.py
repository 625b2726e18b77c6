"""Who is calling: exporters, tracers and transforms want the module itself, whatever mode it is in."""

from __future__ import annotations

import sys

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["compiled_autograd_is_on", "wants_the_module_itself"]

_MODES = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL]


def wants_the_module_itself() -> bool:
    """Whether calls are to be seen in PyTorch's own operations: by torch.export, torch.jit.trace, make_fx, a mode of the user's.

    Fused nodes know reverse-mode derivatives only, and neither torch.func's transforms nor forward-mode AD.
    """
    if torch._C._len_torch_function_stack() and any(map(_is_the_users, _get_current_function_mode_stack())):
        return True
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0 or any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


def _is_the_users(mode: TorchFunctionMode) -> bool:
    """Whether this may change what operations do: a default device does not, nor do verify's draws."""
    return not isinstance(mode, DeviceContext) and not type(mode).__module__.startswith("bnrestructure.")


def compiled_autograd_is_on() -> bool:
    """Whether backward passes are compiled, which they are in PyTorch's own operations."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.compiled_autograd_enabled
