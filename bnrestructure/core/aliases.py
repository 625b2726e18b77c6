"""Fresh tensors over existing storage: what lets forks be threaded and concats be written in place under autograd.

A *view* of a tensor that another node writes to is forbidden to autograd. A new tensor over the same storage is not a view:
it has a version counter of its own, and whoever makes one vouches for the order of reads and writes. Only ``bnrestructure.ops`` makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alias", "channel_slice", "channels_last_buffer"]


def alias(x: Tensor) -> Tensor:
    """A fresh tensor over x's storage with x's shape and strides. Of a view with the negative bit, which no fresh tensor has: a copy."""
    if x.is_neg():
        return x.resolve_neg()
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def channel_slice(x: Tensor, start: int, channels: int) -> Tensor:
    """A fresh tensor over channels ``[start, start + channels)`` of the buffer that ``x`` [N, C, *spatial] lies in.

    ``start + channels`` may exceed C: x may itself be a slice of a wider channels_last buffer, whose pixel pitch bounds it.
    """
    shape = (x.shape[0], channels, *x.shape[2:])
    offset = x.storage_offset() + start * x.stride(1)
    return x.new_empty(0).set_(x.untyped_storage(), offset, shape, x.stride())


def channels_last_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [N, C, *spatial] tensor whose memory order is N, *spatial, C (any number of spatial dimensions)."""
    n, c, *spatial = shape
    storage = torch.empty((n, *spatial, c), dtype=dtype, device=device)
    return storage.movedim(-1, 1)
