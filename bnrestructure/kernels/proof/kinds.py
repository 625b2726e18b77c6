"""What a kernel is specialised for: a call without the values in it, as a key, as text, and as what another process can fill again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnrestructure.core.records import record
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward
from bnrestructure.kernels.operands import fields_of, leaves_of

__all__ = ["Blank", "blanked", "key_of", "mapped", "name_of", "precision", "text_of"]

R = TypeVar("R")

_PRODUCTS = frozenset({ConvForward, ConvBackward})

#: Compilers make use of addresses that are multiples of this many bytes.
_ALIGNMENT = 16


@record
class Blank:
    """A tensor without its values. ``offset``: bytes of its address modulo the alignment; tensors of one ``number`` are the same one."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    number: int


def key_of(call: Call[Any]) -> tuple[Any, ...]:
    """Equal for calls of one kind, on one device. Numbers of type float are arguments of a kernel, and no kind of their own.

    It is taken of each call of a training step, and so is flat: a tensor is five members of it.
    """
    found: list[Any] = [call.operand.get_device()]
    if type(call) in _PRODUCTS and call.dtype is torch.float32:  # type: ignore[attr-defined]  # both have one
        found.append(precision())
    seen: dict[int, int] = {}
    for value in leaves_of(call):
        if isinstance(value, Tensor):
            found += (value.shape, value.stride(), value.dtype, value.data_ptr() % _ALIGNMENT, seen.setdefault(id(value), len(seen)))
        else:
            found.append(float if type(value) is float else value)
    return tuple(found)


def precision() -> str:
    """How PyTorch multiplies fp32 in convolutions: a kernel is another one for tf32."""
    found: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # put there when torch is imported
    return found


def blanked(call: Call[R]) -> Call[R]:
    """The call with a :class:`Blank` in the place of each tensor."""
    numbers: dict[int, int] = {}

    def blank(_: str, x: Tensor) -> Blank:
        return Blank(tuple(x.shape), x.stride(), x.dtype, x.data_ptr() % _ALIGNMENT, numbers.setdefault(id(x), len(numbers)))

    return mapped(call, Tensor, blank)


def mapped(value: Any, of: type, function: Callable[[str, Any], Any], name: str = "") -> Any:
    """A call, or a part of one, with ``function(the field's name, member)`` in the place of each member of type ``of``."""
    if isinstance(value, of):
        return function(name, value)
    if names := fields_of(type(value)):
        members = {field: mapped(getattr(value, field), of, function, field) for field in names}
        return type(value)(**members) if isinstance(value, tuple) else replace(value, **members)
    if type(value) is tuple:
        return tuple(mapped(member, of, function, f"{name}[{i}]") for i, member in enumerate(value))
    return value


def text_of(blanks: Call[Any]) -> str:
    """The kind in words, one text for each kind: what the ledger knows it by."""
    return f"{precision()} {_text(blanks)}"


def _text(value: Any) -> str:
    if isinstance(value, Blank):
        size, strides = "x".join(map(str, value.shape)), ",".join(map(str, value.strides))
        return f"{_dtype(value.dtype)}[{size}]({strides})+{value.offset}#{value.number}"
    if names := fields_of(type(value)):
        members = [(name, getattr(value, name)) for name in names]
        return f"{type(value).__name__}({', '.join(f'{name}={_text(member)}' for name, member in members if member is not None)})"
    if type(value) is tuple:
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, torch.dtype):
        return _dtype(value)
    return "number" if type(value) is float else str(value)


def name_of(blanks: Call[Any]) -> str:
    """``ConvForward of bfloat16 256x64x56x56``: the call and its operand, for people."""
    return f"{type(blanks).__name__} of {_dtype(blanks.operand.dtype)} {'x'.join(map(str, blanks.operand.shape))}"


@cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
