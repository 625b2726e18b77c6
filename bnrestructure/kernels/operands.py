"""The tensors that a kernel call is about, and whether there is memory behind each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from bnrestructure.core.edges import Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward

__all__ = ["fields_of", "reach_of", "readable", "require_fit", "require_memory", "require_memory_of_all", "tensors_of", "weight_of"]

#: What :func:`fields_of` has found.
_fields: dict[type, tuple[str, ...]] = {}


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among a call's arguments, those of its edges and joins as well."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_of(value)
        elif names := fields_of(type(value)):
            yield from tensors_of(getattr(value, name) for name in names)


def fields_of(kind: type) -> tuple[str, ...]:
    """The fields of a record or of a named tuple; none of anything else."""
    found = _fields.get(kind)
    if found is None:
        names = [field.name for field in fields(kind)] if is_dataclass(kind) else getattr(kind, "_fields", ())
        found = _fields[kind] = tuple(names)
    return found


def require_memory_of_all(call: Call[Any]) -> None:
    """Raise RuntimeError where one of the call's tensors is on another type of device than its operand, or longer than its storage."""
    device = call.operand.device.type
    for x in tensors_of([call]):
        require_memory(x, reach_of(x), device)


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
    return 0 if x.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
