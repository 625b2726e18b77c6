"""Who is calling: exporters, tracers and transforms want the module itself, whatever mode it is in."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

__all__ = ["compiled_autograd_is_on", "wants_the_module_itself"]

_MODES = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL]
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def wants_the_module_itself(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is to be seen in PyTorch's own operations.

    torch.export, torch.jit.trace and torch.fx trace what is called; FakeTensorMode and meta tensors have no data for
    kernels; fused nodes know reverse-mode derivatives only, and neither torch.func's transforms nor forward-mode AD.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.autograd.forward_ad._current_level >= 0 or any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES):
        return True
    return any(_is_no_data(leaf) for leaf in pytree.tree_leaves((args, kwargs)))


def compiled_autograd_is_on() -> bool:
    """Whether backward passes are compiled, which they are in PyTorch's own operations."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.compiled_autograd_enabled


def _is_no_data(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return type(leaf) not in _PLAIN or leaf.is_meta
    return type(leaf) is fx.Proxy or isinstance(leaf, fx.Proxy)
