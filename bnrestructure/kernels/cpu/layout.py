"""How tensors cross the C ABI: channels_last activations as (pointer, pitch), per-channel vectors as fp32 pointers.

An activation [N, C, H, W] is *addressable* when element (n, c, h, w) lies at ``((n*H + h)*W + w) * pitch + c`` for some
pitch >= C: channels_last, and channel slices of a wider channels_last buffer. Anything else is copied once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnrestructure.core.activation import PLAIN_ACTIVATIONS, negative_slope
from bnrestructure.kernels.layout import pitch_of
from bnrestructure.kernels.operands import readable

__all__ = [
    "ACTIVATIONS",
    "ELEMENT_CODES",
    "activation_code",
    "addressable",
    "destination",
    "empty_like",
    "unsupported_tensor",
]

#: Activation names and their numbers in src/activation.h; leaky_relu(SLOPE) comes after them.
ACTIVATIONS = {name: number for number, name in enumerate(PLAIN_ACTIVATIONS)}

#: Element types and their numbers in src/activation.h.
ELEMENT_CODES = {torch.float32: 0, torch.bfloat16: 1}


def addressable(x: Tensor) -> tuple[Tensor, int]:
    """(x or a channels_last copy of it, its pitch). Keep the tensor alive while its pointer is in use."""
    pitch = pitch_of(x)
    if pitch:
        return x, pitch
    x = readable(x).contiguous(memory_format=torch.channels_last)
    return x, pitch_of(x)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last activation of x's shape, of pitch C whatever x's pitch."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, memory_format=torch.channels_last)


def destination(x: Tensor, accumulate: Tensor | None) -> Tensor:
    """Where a kernel writes a gradient of x: ``accumulate`` if it can be added to in place, else fresh memory."""
    if accumulate is not None and accumulate.dtype == x.dtype and pitch_of(accumulate):
        return accumulate
    return empty_like(x)


def activation_code(act: str) -> tuple[int, float]:
    """(number, negative slope) of an activation's name. Raises ValueError for an unknown one."""
    code = ACTIVATIONS.get(act)
    if code is not None:
        return code, 0.0
    return len(ACTIVATIONS), negative_slope(act)


def unsupported_tensor(x: Tensor) -> str | None:
    """Why the kernels cannot take x, or None: they take 4-D tensors on the CPU, fp32 or bf16, with elements."""
    if x.dim() != 4:
        return f"the CPU kernels are for 4-D tensors, this one has {x.dim()} dimensions"
    if x.dtype not in ELEMENT_CODES:
        return f"the CPU kernels are for fp32 and bf16, not {x.dtype}"
    if x.device.type != "cpu":
        return f"the CPU kernels cannot reach a tensor on {x.device}"
    if x.numel() == 0:
        return "the tensor is empty"
    return None
