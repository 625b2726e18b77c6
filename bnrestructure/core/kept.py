"""Memory of activations that are kept for the backward pass: a page more than they need, so that it can be used again.

PyTorch takes CPU memory from ``posix_memalign``, and glibc's looks for the bytes asked for *plus the alignment*: the hole that
a freed tensor leaves does not fit the next tensor of the same size. Backward frees one activation after another and asks for gradients
of just their sizes, so that with exact sizes none fits and the process grows through the whole backward pass. With a page to spare the
gradient goes where the activation was.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kept_activation"]

#: More than the alignment and a chunk's header, and large enough for what is left over to be joined to its neighbours when they are freed.
_SLACK_BYTES = 4096

#: Smaller tensors come from malloc's bins, and a page would be a good part of them.
_LARGE_BYTES = 16 * _SLACK_BYTES


def kept_activation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [N, C, *spatial] tensor in the order N, *spatial, C, for what lives from forward to backward.

    Its storage is longer than it where that lets the CPU's memory be used again. What backward itself allocates must have exact sizes.
    """
    strides = [1] * len(shape)
    pitch = shape[1]
    for dim in (*range(len(shape) - 1, 1, -1), 0):
        strides[dim] = pitch
        pitch *= shape[dim]
    if pitch * dtype.itemsize < _LARGE_BYTES or device.type != "cpu":
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return torch.empty(pitch + _SLACK_BYTES // dtype.itemsize, dtype=dtype, device=device).as_strided_(shape, strides)
