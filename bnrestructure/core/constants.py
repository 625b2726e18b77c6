"""Tensors of one number, made once for each device: filling one is a kernel launch of its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["constant"]

_made: dict[tuple[float, torch.device], Tensor] = {}


def constant(value: float, device: torch.device) -> Tensor:
    """``value`` as a tensor [1] in float32 on this device. Nobody may write to it.

    One that is made while a CUDA graph is captured is filled when that graph runs, and is not kept; nor is a fake tensor.
    """
    found = _made.get((value, device))
    if found is not None:
        return found
    made = torch.full((1,), value, dtype=torch.float32, device=device)
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if type(made) is Tensor and not made.is_inference() and not captures:
        _made[value, device] = made
    return made
