"""Walking through the containers that a forward's values are in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnrestructure.capture.sizes import TracedSize

__all__ = ["items", "rebuilt", "tensors_in"]


def items(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key, item) of a dict, (index, item) of a list or tuple."""
    return iter(value.items()) if isinstance(value, dict) else iter(enumerate(value))


def rebuilt(like: Any, parts: dict[Any, Any]) -> Any:
    """A container of the kind of ``like`` with these items."""
    if isinstance(like, dict):
        if type(like) is dict:
            return parts
        for key, item in parts.items():
            if like[key] is not item:
                like[key] = item
        return like
    values = list(parts.values())
    if type(like) in (list, tuple):
        return type(like)(values)
    if type(like) is TracedSize or isinstance(like, torch.Size):
        return tuple(values)
    if hasattr(like, "_fields"):
        return type(like)(*values)
    return like if all(a is b for a, b in zip(like, values, strict=True)) else type(like)(values)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in any nest of containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict) and type(value) is not TracedSize:
        for _, item in items(value):
            yield from tensors_in(item)
