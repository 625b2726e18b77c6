"""channels_last for tensors of 4 dimensions and of 5: PyTorch has a name of its own for each."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["in_channels_last", "is_channels_last", "to_channels_last"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_channels_last(t: Tensor) -> Tensor:
    """t laid out so, itself where it is; a tensor of any other number of dimensions as it is."""
    return t.contiguous(memory_format=_FORMATS[t.dim()]) if t.dim() in _FORMATS else t


def is_channels_last(t: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor laid out so, and not contiguous as well."""
    if not isinstance(t, Tensor) or t.dim() not in _FORMATS or t.is_contiguous():
        return False
    return t.is_contiguous(memory_format=_FORMATS[t.dim()])


def to_channels_last(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model, changed in place, and its inputs: parameters and tensors of 4 and 5 dimensions laid out so."""
    for parameter in model.parameters():  # Module.to() refuses models that have 5-D ones too
        parameter.data = in_channels_last(parameter.data)
    return model, pytree.tree_map_only(Tensor, in_channels_last, inputs)
