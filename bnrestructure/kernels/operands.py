"""The tensors that a kernel call is about, and whether there is memory behind each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward

__all__ = [
    "checked_kind", "fields_of", "reach_of", "readable", "require_fit", "require_memory", "values_of", "weight_of",
]  # fmt: skip

#: What :func:`fields_of` has found, and what gives these fields.
_fields: dict[type, tuple[str, ...]] = {}
_getters: dict[type, Callable[[Any], Any]] = {}
_NO_TENSORS = frozenset({bool, int, float, str, torch.dtype})


def fields_of(kind: type) -> tuple[str, ...]:
    """The fields of a record or of a named tuple; none of anything else."""
    found = _fields.get(kind)
    if found is None:
        names = [field.name for field in fields(kind)] if is_dataclass(kind) else getattr(kind, "_fields", ())
        found = _fields[kind] = tuple(names)
    return found


def values_of(record: Any) -> tuple[Any, ...]:
    """The fields' values of a record or of a named tuple, at once."""
    kind = type(record)
    found = _getters.get(kind)
    if found is None:
        names = fields_of(kind)
        found = _getters[kind] = attrgetter(*names) if len(names) > 1 else lambda record: (getattr(record, names[0]),)
    values: tuple[Any, ...] = found(record)
    return values


def checked_kind(call: Call[Any]) -> tuple[Any, ...]:
    """What kernels can tell a call's kind by: equal for calls whose tensors are alike in shape, strides and dtype, and all else is equal.

    Raises RuntimeError where one of the tensors is on another type of device than the call's operand, or longer than its storage. In one
    piece, without calling anything in Python for a tensor that is all right: it looks at each tensor of each call of a training step.
    """
    device = call.operand.device.type
    found: list[Any] = [type(call)]
    left = list(values_of(call))
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            shape, strides, reach = value.shape, value.stride(), value.numel()
            if reach and not value.is_contiguous():
                reach = 1
                for size, stride in zip(shape, strides, strict=True):
                    reach += (size - 1) * stride
            try:
                short = (value.storage_offset() + reach) * value.itemsize > value.untyped_storage().nbytes()
            except NotImplementedError:  # a functorch wrapper
                short = False
            if short or value.device.type != device:
                require_memory(value, reach, device)
            found += (shape, strides, value.dtype)
        elif isinstance(value, tuple):
            left += value
            found.append(len(value))
        elif value is not None and type(value) not in _NO_TENSORS and fields_of(type(value)):
            left += values_of(value)
            found.append(type(value))
        else:
            found.append(value)
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
