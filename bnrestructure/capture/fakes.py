"""Fake tensors that are laid out in memory as the CPU's kernels lay out the real ones, where PyTorch's own fake kernels say otherwise.

The layout of a tensor decides what a dropout behind it draws, and what a ``view`` of it may do. Strides matter even along dimensions of one
element: a tensor [N, 1, H, W] is contiguous and channels_last at once, and a convolution tells by its strides which of them it continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from bnrestructure.core.memory_format import is_channels_last

__all__ = ["FaithfulFakeMode", "without_log"]

aten = torch.ops.aten


def _contiguous(_: Tensor) -> torch.memory_format:
    return torch.contiguous_format


def _contiguous_first(x: Tensor) -> torch.memory_format:
    """Contiguous where it may be seen so, channels_last where it may be seen so, else what the strides resemble."""
    if x.is_contiguous():
        return torch.contiguous_format
    if is_channels_last(x):
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return suggest_memory_format(x)


#: The format of the first result, from the first argument.
_FORMATS: dict[Any, Callable[[Tensor], torch.memory_format]] = {
    aten.native_group_norm: suggest_memory_format, aten.native_batch_norm: _contiguous_first, aten.roll: suggest_memory_format,
    aten.native_channel_shuffle: suggest_memory_format, aten.channel_shuffle: suggest_memory_format,
    aten.upsample_nearest2d: suggest_memory_format, aten.upsample_bilinear2d: suggest_memory_format,
    aten.log_sigmoid_forward: _contiguous, aten.rrelu_with_noise: _contiguous, aten.native_layer_norm: _contiguous,
}  # fmt: skip

#: Pointwise, but a second operand that is a number, or bounds that are, keep them from the path that all contiguous tensors take.
_WITH_NUMBERS = {
    aten.mul, aten.add, aten.sub, aten.div, aten.rsub, aten.hardtanh, aten.gt, aten.lt, aten.ge, aten.le, aten.eq, aten.ne,
}  # fmt: skip
#: Copies that PyTorch counts among the pointwise operations; they keep the strides that they are given.
_COPIES = {aten.clone, torch.ops.prims.convert_element_type}
#: Results with the strides of the first argument, where its elements lie side by side.
_KEEPS = {aten._prelu_kernel, aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like}


class FaithfulFakeMode(FakeTensorMode):
    """PyTorch's fake tensors, but for the layouts above, and strides along dimensions of one element."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if not isinstance(first, Tensor) or first.device.type != "cpu" or not isinstance(func, torch._ops.OpOverload):
            return result
        packet = func.overloadpacket
        if packet is aten.view and 1 in first.shape:
            return self._strided_as_a_view(args[0], first)
        strides: tuple[int, ...] | None
        if packet in _FORMATS:
            strides = _strides(first, _FORMATS[packet](args[0]))
        elif packet in _KEEPS and not (kwargs or {}).get("memory_format"):
            strides = _kept(args[0])
        elif torch.Tag.pointwise in func.tags and 1 in first.shape and packet not in _COPIES and not func._schema.is_mutable:
            strides = _pointwise(packet, args, first)
        else:
            return result
        if strides not in (None, first.stride()):
            with self:
                first = torch.empty_strided(first.shape, strides, dtype=first.dtype)
        return (first, *result[1:]) if isinstance(result, tuple) else first

    def _strided_as_a_view(self, x: Tensor, viewed: Tensor) -> Tensor:
        """``viewed``, a view of x, with the strides that PyTorch's own rule gives it, which runs on the meta device."""
        strides = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta").view(viewed.shape).stride()
        if viewed.stride() == strides:
            return viewed
        args = (x, viewed.shape, strides, x.storage_offset())
        return cast(Tensor, super().__torch_dispatch__(aten.as_strided.default, (), args, {}))


def _strides(x: Tensor, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(x.shape, device="meta", memory_format=layout).stride()


def _pointwise(packet: Any, args: Any, result: Tensor) -> tuple[int, ...] | None:
    """The result's strides: tensors that may all be seen as contiguous give one that is, a number beside a tensor keeps the tensor's."""
    tensors = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)]
    if any(t.shape != result.shape for t in tensors):
        return None
    if len(tensors) == 1 and packet in _WITH_NUMBERS:
        return _kept(tensors[0])
    return _strides(result, torch.contiguous_format) if all(t.is_contiguous() for t in tensors) else None


def _kept(x: Tensor) -> tuple[int, ...] | None:
    """The strides of x where its elements lie side by side, in whatever order of the dimensions."""
    return x.stride() if x.permute(sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)).is_contiguous() else None


@contextmanager
def without_log() -> Iterator[None]:
    """PyTorch logs each operation that fails on fake tensors as an error, with a traceback. Here whoever runs them tells of it, or tries
    another input; a forward that catches the exception goes on.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
