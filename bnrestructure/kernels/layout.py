"""What every compiled kernel asks of memory, on any device: pixels at one pitch, per-channel vectors in fp32."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.operands import readable

__all__ = ["pitch_of", "vector"]


def pitch_of(x: Tensor) -> int:
    """Elements between neighbouring pixels of x [N, C, H, W], or 0 when x is not addressable that way."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    if sc != 1 and c != 1:
        return 0
    # Strides of dimensions of size 1 mean nothing, so the pitch is read from the innermost one that is larger.
    if w > 1:
        pitch = sw
        if (h > 1 and sh != w * pitch) or (n > 1 and sn != h * w * pitch):
            return 0
    elif h > 1:
        pitch = sh
        if n > 1 and sn != h * pitch:
            return 0
    else:
        pitch = sn if n > 1 else c
    return pitch if pitch >= c else 0


@overload
def vector(v: Tensor) -> Tensor: ...
@overload
def vector(v: None) -> None: ...
@overload
def vector(v: Tensor | None) -> Tensor | None: ...
def vector(v: Tensor | None) -> Tensor | None:
    """A per-channel vector as contiguous fp32 without the negative bit; the tensor itself when it is that already."""
    if v is None or (v.dtype is torch.float32 and v.is_contiguous() and not v.is_neg()):
        return v
    if not v.is_floating_point():
        raise UnsupportedCallError(f"a per-channel vector of {v.dtype}")
    return readable(v).detach().to(torch.float32).contiguous().resolve_neg()
