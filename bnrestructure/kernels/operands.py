"""The tensors that a kernel call is about, and whether there is memory behind each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, PoolGeometry, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward

__all__ = [
    "checked_kind", "fields_of", "leaves_of", "reach_of", "readable", "require_fit", "require_memory", "weight_of",
]  # fmt: skip

#: What :func:`fields_of` has found, and what gives the values of these fields.
_fields: dict[type, tuple[str, ...]] = {}
_getters: dict[type, Callable[[Any], Any]] = {}
#: Types of what is a part of a call as a whole.
_LEAVES = frozenset({type(None), bool, int, float, str, torch.dtype, ConvGeometry, PoolGeometry})


def fields_of(kind: type) -> tuple[str, ...]:
    """The fields of a record or of a named tuple; none of anything else."""
    found = _fields.get(kind)
    if found is None:
        names = [field.name for field in fields(kind)] if is_dataclass(kind) else getattr(kind, "_fields", ())
        found = _fields[kind] = tuple(names)
    return found


def leaves_of(call: Call[Any]) -> list[Any]:
    """All that a call is made of, flat: its tensors and numbers, with the type of each record and the length of each tuple before theirs.

    In one piece: it is asked of each call of a training step, more than once.
    """
    found: list[Any] = []
    left: list[Any] = [call]
    while left:
        value = left.pop()
        kind = type(value)
        if kind in _LEAVES or isinstance(value, Tensor):
            found.append(value)
        elif kind is tuple:
            found.append(len(value))
            left += value
        else:
            getter = _getters.get(kind)
            if getter is None and (names := fields_of(kind)):
                getter = _getters[kind] = attrgetter(*names) if len(names) > 1 else _alone(names[0])
            found.append(value if getter is None else kind)
            left += () if getter is None else getter(value)
    return found


def _alone(name: str) -> Callable[[Any], tuple[Any]]:
    return lambda record: (getattr(record, name),)


def checked_kind(call: Call[Any]) -> tuple[Any, ...]:
    """What kernels can tell a call's kind by: equal for calls whose tensors are alike in all but their numbers, and all else is equal.

    Raises RuntimeError where one of the tensors is on another type of device than the call's operand, or longer than its storage.
    """
    device = call.operand.device.type
    found: list[Any] = []
    for value in leaves_of(call):
        if not isinstance(value, Tensor):
            found.append(value)
            continue
        shape, strides, reach = value.shape, value.stride(), value.numel()
        if reach and not value.is_contiguous():  # as reach_of() has it
            reach = 1
            for size, stride in zip(shape, strides, strict=True):
                reach += (size - 1) * stride
        try:
            short = (value.storage_offset() + reach) * value.itemsize > value.untyped_storage().nbytes()
        except NotImplementedError:  # a functorch wrapper
            short = False
        if short or value.device.type != device:
            require_memory(value, reach, device)
        found += (shape, strides, value.dtype, value.is_neg())
    return tuple(found)


def require_memory(x: Tensor, reach: int, device: str) -> None:
    """Raise RuntimeError, in PyTorch's words, where x is on another type of device or its storage ends before ``reach`` elements.

    A storage becomes shorter than its tensors where somebody resizes it: PyTorch's own kernels would read on behind its end.
    """
    if x.device.type != device:
        raise RuntimeError(f"Tensor on device {x.device} is not on the expected device {device}!")
    try:
        available = x.untyped_storage().nbytes()
    except NotImplementedError:  # a functorch wrapper: PyTorch's operators look behind it
        return
    if reach > 0 and device != "meta" and (x.storage_offset() + reach) * x.itemsize > available:
        raise RuntimeError(f"a tensor of shape {list(x.shape)} reaches beyond its storage, which has {available} bytes")


def require_fit(x: Tensor, *transforms: Transform) -> None:
    """Raise UnsupportedCallError where a transform's vectors are not one number a channel of x, or its gate one a channel of each image.

    For what runs several kernels: the last must not find out when the first has written already.
    """
    for t in transforms:
        for vector in (t.mean, t.scale, t.beta):
            if vector is not None and (vector.shape != x.shape[1:2] or not vector.is_floating_point()):
                raise UnsupportedCallError(f"a per-channel vector {list(vector.shape)} of {vector.dtype} for {x.shape[1]} channels")
        if t.gate is not None and t.gate.shape != x.shape[:2]:
            raise UnsupportedCallError(f"a gate {list(t.gate.shape)} for {list(x.shape)}")


def weight_of(call: ConvForward | ConvBackward) -> Tensor:
    """The weight to multiply by: cast already, where somebody has it so."""
    return call.weight if call.cast is None else call.cast


def readable(x: Tensor, beside: Tensor | None = None) -> Tensor:
    """x, which PyTorch is about to read: RuntimeError where it is longer than its storage, or on another type of device than ``beside``.

    PyTorch's CPU convolutions read a weight on the meta device as if it had memory.
    """
    require_memory(x, reach_of(x), (x if beside is None else beside).device.type)
    return x


def reach_of(x: Tensor) -> int:
    """Elements from x's first to its last one in memory, both counted; none where it has none."""
    if x.numel() == 0:
        return 0
    reach = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        reach += (size - 1) * stride
    return reach
