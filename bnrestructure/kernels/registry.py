"""The one list of kernel implementations, and the choice among them for a node's actual arguments.

An implementation is a module with the functions of ``kernels/reference`` and ``supports(name, args, kwargs)``, which gives a
one-line reason when it cannot run these arguments, or None. ``auto`` takes the implementation of the tensor's device where it
supports the call, and the reference otherwise; the reference supports everything. Devices' kernels are for 4-D activations; others reach
them through kernels/folded. The CUDA kernels have to be asked for by name until they have been proved on a device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bnrestructure.kernels import reference

if TYPE_CHECKING:  # it imports ops, which import this
    from bnrestructure.kernels.folded import FoldedKernels

__all__ = ["BACKENDS", "folded", "implementation", "reason_for_device", "select", "unavailable_reason"]

#: What ``restructure(backend=...)`` accepts.
BACKENDS = ("auto", "reference", "cpu", "cuda")

_DEVICE_MODULES = {"cpu": "bnrestructure.kernels.cpu", "cuda": "bnrestructure.kernels.cuda"}

#: What ``auto`` leaves alone, and why: users get it by asking for it.
_ON_REQUEST = {"cuda": "the CUDA kernels have not been tried on a device yet: backend='cuda' asks for them"}

#: Where the first activation stands among a kernel's arguments, if not in front.
_ACTIVATION = {"squeeze_backward": 2}


@cache
def implementation(name: str) -> ModuleType | None:
    """The implementation module for a device type, or None where this installation has none."""
    if name == "reference":
        return reference
    try:
        module = importlib.import_module(_DEVICE_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("bnrestructure"):
            return None
        raise
    return module if module.__file__ is not None else None  # a folder without code is a namespace package


@cache
def unavailable_reason(name: str) -> str | None:
    """Why no kernel of this implementation can run in this installation at all, or None if some can."""
    if name == "reference":
        return None
    module = implementation(name)
    if module is None:
        return f"this installation has no {name} kernels"
    return module.unavailable_reason()


def reason_for_device(backend: str, device: str) -> str | None:
    """Why ``backend`` uses no kernels of tensors on this type of device (then the reference runs), or None."""
    if backend == "reference":
        return "the reference backend was asked for"
    if device not in _DEVICE_MODULES:
        return f"there are no {device} kernels"
    if backend not in ("auto", device):
        return f"backend {backend!r} was asked for, the tensor is on {device}"
    return _ON_REQUEST.get(device) if backend == "auto" else None


def select(backend: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The function to call for kernel ``name`` on these arguments; ``args[0]`` is a tensor, or has a tensor's ``device`` and ``dim``."""
    module: ModuleType | FoldedKernels | None = _usable(backend, args[0].device.type)
    if module is not None:
        dimensions = args[_ACTIVATION.get(name, 0)].dim()
        if dimensions not in (4, 1):  # the finalize kernels are for vectors
            module = folded(module)
        if module.supports(name, args, kwargs) is not None:
            module = None
    kernel: Callable[..., Any] = getattr(reference if module is None else module, name)
    return kernel


@cache
def folded(module: ModuleType) -> FoldedKernels:
    """The implementation for activations that are not 4-D."""
    from bnrestructure.kernels.folded import FoldedKernels

    return FoldedKernels(module)


@cache
def _usable(backend: str, device: str) -> ModuleType | None:
    """The implementation whose kernels ``backend`` may use of tensors on this type of device, or None."""
    usable = reason_for_device(backend, device) is None and unavailable_reason(device) is None
    return implementation(device) if usable else None
