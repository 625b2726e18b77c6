"""A place for a node's result in the buffer of a concat: where it is written, and which part of the buffer's gradient is its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.aliases import channel_slice
from bnrestructure.core.kept import kept_activation

__all__ = ["Slot", "Written", "incoming_gradient", "opened"]


class Slot(NamedTuple):
    """Where in a concat's buffer a node writes its result, of C channels: as channels ``[offset, offset + C)``.

    into      the buffer, or None for a new one of ``channels`` channels
    offset    None appends: the result comes right behind the channels of ``into``, and is returned together with them
    visible   how many channels of the buffer are returned; None: those of ``into``
    """

    into: Tensor | None = None
    offset: int | None = 0
    channels: int | None = None
    visible: int | None = None


class Written(NamedTuple):
    """Where a result was written: the channels of the buffer that it was given, or None for a new one; its first channel, and how many."""

    into_channels: int | None
    offset: int
    channels: int


def opened(
    slot: Slot, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Written]:
    """(the concat buffer to return, the slice of it to write, what backward must know of that) for a result of this shape."""
    into, before = slot.into, None if slot.into is None else slot.into.shape[1]
    if into is None:
        into = kept_activation((shape[0], slot.channels or 0, *shape[2:]), dtype, device)
    if slot.offset is None:
        offset, visible = into.shape[1], into.shape[1] + shape[1]
    else:
        offset, visible = slot.offset, into.shape[1] if slot.visible is None else slot.visible
    return channel_slice(into, 0, visible), channel_slice(into, offset, shape[1]), Written(before, offset, shape[1])


def incoming_gradient(written: Written, dbuffer: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the gradient at what was written, the rest for the buffer that it was written into) from that of the buffer."""
    dinto = None if written.into_channels is None else dbuffer.narrow(1, 0, written.into_channels)
    return dbuffer.narrow(1, written.offset, written.channels), dinto
