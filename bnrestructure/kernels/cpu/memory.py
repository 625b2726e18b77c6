"""Where a tensor becomes an address: what C++ is about to touch is held against the tensor's own memory, here and nowhere else.

A caller says what its kernel reads or writes; nothing outside of that, and nothing outside of the tensor's storage, is ever touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnrestructure.core.errors import UnexpectedTensorError
from bnrestructure.kernels.operands import require_memory

__all__ = ["address", "of_parameter", "of_pixels", "of_vector", "of_weight"]


def address(x: Tensor | None, reach: int, dtype: torch.dtype) -> int:
    """The address of x's first element, for a kernel that touches no more than the ``reach`` elements from there on; 0 for no tensor.

    The tensor must outlive the call. Raises UnexpectedTensorError for another dtype, RuntimeError for a tensor that is not in the CPU's
    memory or whose storage is shorter than that (somebody resized it).
    """
    if x is None:
        return 0
    if x.dtype is not dtype:
        raise UnexpectedTensorError(f"a tensor of {x.dtype} where {dtype} was expected")
    if not x.is_cpu or (x.storage_offset() + reach) * dtype.itemsize > x.untyped_storage().nbytes():
        require_memory(x, reach, "cpu")
    return x.data_ptr()


def of_pixels(x: Tensor | None, pitch: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """The address of an activation [N, C, H, W] of this shape and pixel pitch."""
    if x is None:
        return 0
    n, c, h, w = shape
    if x.shape != shape or pitch < c:
        raise UnexpectedTensorError(f"a tensor of shape {list(x.shape)} and pixel pitch {pitch} where {list(shape)} was expected")
    return address(x, (n * h * w - 1) * pitch + c, dtype)


def of_vector(v: Tensor | None, *shape: int) -> int:
    """The address of a contiguous tensor of this shape in float32: [C], or [N, C]."""
    if v is None:
        return 0
    if v.shape != shape or not v.is_contiguous():
        raise UnexpectedTensorError(f"a tensor of shape {list(v.shape)} and strides {v.stride()} where {list(shape)} was expected")
    return address(v, v.numel(), torch.float32)


def of_parameter(v: Tensor | None, channels: int) -> int:
    """The address of a batch norm's parameter or running statistic: contiguous, of any dtype."""
    if v is None:
        return 0
    if v.numel() != channels or not v.is_contiguous():
        raise UnexpectedTensorError(f"a parameter of shape {list(v.shape)} and strides {v.stride()} for {channels} channels")
    return address(v, channels, v.dtype)


def of_weight(weight: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> int:
    """The address of a convolution's weight [C_out, C_in / groups, *kernel] of this shape, of any strides."""
    if weight is None:
        return 0
    if weight.shape != shape:
        raise UnexpectedTensorError(f"a weight of shape {list(weight.shape)} where {list(shape)} was expected")
    return address(weight, 1 + sum((n - 1) * s for n, s in zip(shape, weight.stride(), strict=True)), dtype)
