"""Fake tensors that are laid out in memory as the CPU's kernels lay out the real ones, where PyTorch's own fake kernels say otherwise.

The layout of a tensor decides what a dropout behind it draws, and what a ``view`` of it may do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["FaithfulFakeMode"]

aten = torch.ops.aten


def _contiguous(_: Tensor) -> torch.memory_format:
    return torch.contiguous_format


#: The format of the first result, from the first argument.
_FORMATS: dict[Any, Callable[[Tensor], torch.memory_format]] = {
    aten.native_group_norm: suggest_memory_format, aten.native_batch_norm: suggest_memory_format, aten.roll: suggest_memory_format,
    aten.native_channel_shuffle: suggest_memory_format, aten.channel_shuffle: suggest_memory_format,
    aten.log_sigmoid_forward: _contiguous, aten.rrelu_with_noise: _contiguous,
}  # fmt: skip


class FaithfulFakeMode(FakeTensorMode):
    """PyTorch's fake tensors, but for the layouts above."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        layout = _FORMATS.get(getattr(func, "overloadpacket", None))
        first = result[0] if isinstance(result, tuple) else result
        if layout is None or not isinstance(first, Tensor) or first.device.type != "cpu":
            return result
        with self:
            first = torch.empty(first.shape, dtype=first.dtype, device=first.device).contiguous(memory_format=layout(args[0]))
        return (first, *result[1:]) if isinstance(result, tuple) else first
