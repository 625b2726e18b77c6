"""Who is calling: exporters, tracers and transforms want the module itself, whatever mode it is in."""

from __future__ import annotations

import sys

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["compiled_autograd_is_on", "operations_are_overridden", "wants_the_module_itself"]

_MODES = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL]


def wants_the_module_itself() -> bool:
    """Whether calls are to be seen in PyTorch's own operations: by torch.export, torch.jit.trace, make_fx or a FakeTensorMode.

    Fused nodes know reverse-mode derivatives only, and neither torch.func's transforms nor forward-mode AD.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0 or any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


def operations_are_overridden() -> bool:
    """Whether a TorchFunctionMode may change what operations do: a default device does not, nor does verify's widening."""
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []
    return any(not isinstance(m, DeviceContext) and not type(m).__module__.startswith("bnrestructure.") for m in modes)


def compiled_autograd_is_on() -> bool:
    """Whether backward passes are compiled, which they are in PyTorch's own operations."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.compiled_autograd_enabled
