"""What a forward() returns, as a graph's output: containers that fx keeps, or the leaves of others and how to put them together again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from bnrestructure.capture.containers import tensors_in
from bnrestructure.capture.recorder import Recorder
from bnrestructure.capture.sizes import is_traced
from bnrestructure.core.errors import CaptureError

__all__ = ["as_output"]

Rebuild = Callable[[Sequence[Any]], Any]


@cache
def _own_attributes() -> frozenset[str]:
    """What a fake tensor has of its own."""
    with FakeTensorMode():
        return frozenset({*vars(torch.empty(0)), "_is_param", "grad_fn"})


def as_output(result: Any, recorder: Recorder) -> tuple[Any, Rebuild | None]:
    """(what the graph's output node holds, what makes the forward's result of that; None where it is the result).

    Raises CaptureError for an object that a tensor may be hidden in.
    """
    if any(vars(t).keys() - _own_attributes() for t in tensors_in(result)):
        raise CaptureError("its forward puts an attribute on a tensor that it returns")
    if _fx_keeps(result):
        return recorder.lowered(result, "return"), None
    leaves, spec = pytree.tree_flatten(result, is_leaf=_is_object)
    if not any(_is_object(leaf) for leaf in leaves):
        return [recorder.lowered(leaf, "return") for leaf in leaves], lambda values: pytree.tree_unflatten(list(values), spec)
    fields = [_fields(leaf) if _is_object(leaf) else None for leaf in leaves]
    parts = [as_output(leaf if of is None else of, recorder) for leaf, of in zip(leaves, fields, strict=True)]

    def rebuild(values: Sequence[Any]) -> Any:
        made = []
        for value, leaf, of, (_, inner) in zip(values, leaves, fields, parts, strict=True):
            value = value if inner is None else inner(value)
            made.append(value if of is None else _remade(leaf, value))
        return pytree.tree_unflatten(made, spec)

    return [output for output, _ in parts], rebuild


def _is_object(value: Any) -> bool:
    """Whether this is a dataclass' object, or a container that pytree does not open: a size, one of a class of the user's own."""
    if isinstance(value, type) or pytree._get_node_type(value) in pytree.SUPPORTED_NODES:
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, dict | list | tuple)


def _fields(value: Any) -> dict[Any, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(value) if isinstance(value, dict) else dict(enumerate(value))


def _remade(like: Any, fields: dict[Any, Any]) -> Any:
    """An object like this one with these parts, made without its class' own ``__init__``."""
    if isinstance(like, torch.Size):
        return torch.Size(fields.values())
    made: Any = tuple.__new__(type(like), fields.values()) if isinstance(like, tuple) else copy.copy(like)
    if isinstance(like, tuple) and hasattr(like, "__dict__"):
        vars(made).update(vars(like))
    if dataclasses.is_dataclass(like):
        for name, value in fields.items():
            object.__setattr__(made, name, value)  # the class may be frozen
    if isinstance(like, dict):  # some dataclasses are dicts as well
        dict.update(made, {name: value for name, value in fields.items() if name in like})
    if isinstance(like, list):
        list.__setitem__(made, slice(None), fields.values())
    return made


def _fx_keeps(value: Any) -> bool:
    """Whether a graph's output can hold this nest of containers as it is (its code knows no classes of anybody's)."""
    if isinstance(value, Tensor | fx.Node) or is_traced(value):
        return True
    if isinstance(value, dict):
        return type(value) is dict and all(_fx_keeps(v) for v in value.values())
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(_fx_keeps(v) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return True
    if type(value) in pytree.SUPPORTED_NODES or _is_object(value):
        return False
    raise CaptureError(f"its forward returns an object of type {type(value).__name__}")
