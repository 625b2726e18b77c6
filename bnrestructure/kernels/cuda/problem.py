"""A convolution's shape as the kernels are told it at compile time."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton.language as tl

from bnrestructure.core.edges import ConvGeometry, Transform
from bnrestructure.kernels.cuda.device import uses_tf32

__all__ = ["geometry_constants", "is_gathered", "is_heavy", "is_padded", "precision_of", "triton_dtype", "unit_of"]


def geometry_constants(geometry: ConvGeometry, kernel: Sequence[int]) -> dict[str, int]:
    """Kernel size, stride, padding and dilation as KH, KW, SH, SW, PH, PW, DH, DW."""
    pairs = {"K": kernel, "S": geometry.stride, "P": geometry.padding, "D": geometry.dilation}
    return {f"{name}{axis}": int(pair[i]) for name, pair in pairs.items() for i, axis in enumerate("HW")}


def is_gathered(channels: int, kernel: Sequence[int]) -> bool:
    """Whether a step of the reduction should run through several taps: with fewer channels than a step is deep (a
    model's first convolution has three), steps of one tap each would be mostly empty.
    """
    return channels < 16 and kernel[0] * kernel[1] > 1


def is_padded(geometry: ConvGeometry) -> bool:
    """Whether a tap can lie outside the input."""
    return any(geometry.padding)


def is_heavy(transform: Transform, *channels: int) -> bool:
    """Whether a kernel with this transform needs many registers: a smooth activation (its exponentials), a gate
    (addresses by image and channel), or numbers of channels that forbid vector loads, so that every element has an
    address of its own.
    """
    smooth = transform.act in ("silu", "hardswish", "gelu", "gelu_tanh")
    return smooth or transform.gate is not None or gcd(*channels) % 8 != 0


def unit_of(*sizes: int) -> int:
    """The constant UNIT of a kernel with these pitches and numbers of channels (see precision.in_units).

    Triton looks for multiples of 16 among its arguments, and where one is not finds no vector loads: 24, 40, 72 and 200 channels would be
    read number by number. 8 or 4 where all are multiples of that; 1 where Triton sees as much by itself, or there is nothing to be seen.
    """
    common = gcd(*sizes)
    return 1 if common % 16 == 0 else gcd(common, 8) if common % 4 == 0 else 1


def precision_of(dtype: torch.dtype) -> str:
    """How products of this dtype are formed: for fp32 PyTorch's own switch for convolutions decides, TF32 or IEEE."""
    return "tf32" if dtype == torch.float32 and uses_tf32() else "ieee"


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for an element type that the kernels take."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
