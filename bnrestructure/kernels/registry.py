"""The one list of kernel implementations, and the choice among them for each call.

An implementation is a :class:`bnrestructure.kernels.calls.Kernels`. ``auto`` takes that of the tensor's device where it can answer the
call, and the reference otherwise; the reference answers everything. Devices' kernels are for 4-D activations; others reach them through
kernels/folded. On a device of ``_PROVED_FIRST`` kernels answer calls of kinds that were proved there (kernels/proof).
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TypeVar

import torch

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import Call, Kernels
from bnrestructure.kernels.device import DeviceKernels
from bnrestructure.kernels.folded import for_dimensions
from bnrestructure.kernels.proof.prover import Proved
from bnrestructure.kernels.reference import REFERENCE

__all__ = ["BACKENDS", "forget_answers", "implementation", "proved", "proving", "reason_for_device", "run", "unavailable_reason"]

R = TypeVar("R")

#: What ``restructure(backend=...)`` accepts.
BACKENDS = ("auto", "reference", "cpu", "cuda")

_DEVICES = {"cpu": "bnrestructure.kernels.cpu", "cuda": "bnrestructure.kernels.cuda"}

#: Devices that come in many kinds, and whose compilers may be of any version: nothing is believed of kernels on one that was not seen.
_PROVED_FIRST = {"cuda"}


def run(backend: str, call: Call[R]) -> R:
    """The call's result by the implementation for its tensors, with autocast off: kernels do their own casting."""
    operand = call.operand
    device = "cpu" if operand.is_cpu else operand.device.type
    kernels = _usable(backend, device, operand.dim())
    if not torch.is_autocast_enabled(device):
        try:
            return REFERENCE.run(call) if kernels is None else kernels.run(call)
        except UnsupportedCallError:
            return REFERENCE.run(call)
    torch.set_autocast_enabled(device, False)  # a torch.autocast block costs ten times as much, a thousand times a step
    try:
        return run(backend, call)
    finally:
        torch.set_autocast_enabled(device, True)


@cache
def implementation(device: str) -> DeviceKernels | None:
    """The implementation for a type of device, or None where this installation has none."""
    try:
        module = importlib.import_module(_DEVICES[device])
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("bnrestructure"):
            return None
        raise
    return getattr(module, "KERNELS", None)  # a folder without code is a namespace package


@cache
def unavailable_reason(name: str) -> str | None:
    """Why no kernel of this implementation can run in this installation at all, or None if some can."""
    if name == "reference":
        return None
    kernels = implementation(name)
    return f"this installation has no {name} kernels" if kernels is None else kernels.unavailable_reason()


def reason_for_device(backend: str, device: str) -> str | None:
    """Why ``backend`` uses no kernels of tensors on this type of device (then the reference runs), or None."""
    if backend == "reference":
        return "the reference backend was asked for"
    if device not in _DEVICES:
        return f"there are no {device} kernels"
    if backend not in ("auto", device):
        return f"backend {backend!r} was asked for, the tensor is on {device}"
    return None


@cache
def _usable(backend: str, device: str, dimensions: int) -> Kernels | None:
    """What ``backend`` may use of tensors on this type of device with so many dimensions, or None; vectors have one."""
    if reason_for_device(backend, device) is not None or unavailable_reason(device) is not None:
        return None
    if (kernels := proved(device)) is not None:
        return kernels
    of_device = implementation(device)
    return None if of_device is None else for_dimensions(of_device, dimensions)


@cache
def proved(device: str) -> Proved | None:
    """What answers for a type of device where kernels are proved first; None where they are not, or there are none."""
    if device not in _PROVED_FIRST or unavailable_reason(device) is not None:
        return None
    kernels = implementation(device)
    return None if kernels is None else Proved(kernels, _DEVICES[device])


def proving(backend: str, device: str) -> Proved | None:
    """What answers calls on this type of device where kernels are proved first and ``backend`` uses them; None otherwise."""
    kernels = proved(device)
    return None if kernels is None or reason_for_device(backend, device) is not None else kernels


def forget_answers() -> None:
    """Ask again which kernels there are: for those who put others in their place (tests, dry runs)."""
    for answers in (implementation, unavailable_reason, proved, _usable):
        answers.cache_clear()
