"""How activations reach the kernels: channels_last memory as (tensor, pixel pitch), with wide offsets where needed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnrestructure.kernels.layout import pitch_of, vector

__all__ = ["Pixels", "destination", "empty_pixels", "packed_weight", "pixels", "vector", "vectors"]

_REACH = 2**31


class Pixels(NamedTuple):
    """An activation [N, C, H, W] whose element (n, c, h, w) lies at ``((n*H + h)*W + w) * pitch + c``, pitch >= C.

    ``rows`` is N * H * W; ``wide`` whether an offset into it may not fit 32 bits. Tiles may reach over the end by less than the margin.
    """

    tensor: Tensor
    pitch: int
    rows: int
    wide: bool


def pixels(x: Tensor) -> Pixels:
    """``x`` itself where a kernel can address it (channels_last, or a channel slice of that), else such a copy."""
    pitch = pitch_of(x)
    if pitch == 0:
        x = x.contiguous(memory_format=torch.channels_last)
        pitch = pitch_of(x)
    return _at(x, pitch)


def empty_pixels(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Pixels:
    """An uninitialised channels_last activation of pitch C."""
    return _at(torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last), shape[1])


def destination(like: Tensor, dtype: torch.dtype, given: Tensor | None) -> Pixels:
    """Where to write a tensor of ``like``'s shape: ``given`` if it fits and can be addressed, else new memory."""
    if given is not None and given.dtype == dtype and (pitch := pitch_of(given)):
        return _at(given, pitch)
    return empty_pixels(tuple(like.shape), dtype, like.device)


def _at(x: Tensor, pitch: int) -> Pixels:
    n, _, h, w = x.shape
    rows = n * h * w
    return Pixels(x, pitch, rows, (rows + 2**12) * pitch >= _REACH)


def vectors(*given: Tensor | None) -> tuple[Tensor | None, ...]:
    """Per-channel vectors as contiguous fp32; None stays None."""
    found: list[Tensor | None] = []
    for v in given:  # most are what they should be: this runs several times for each call
        found.append(v if v is None or (v.dtype is torch.float32 and v.is_contiguous()) else vector(v))
    return tuple(found)


def packed_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [C_out, C_in / groups, KH, KW] in ``dtype`` and in [C_out, KH, KW, C_in / groups] memory order."""
    return weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
