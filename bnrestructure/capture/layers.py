"""What PyTorch's most frequent layers return for fake tensors, told from shapes: running them takes ten times as long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for

from bnrestructure.core.memory_format import is_channels_last
from bnrestructure.graph import activations

__all__ = ["keeps_shape", "known_result"]

_BATCH_NORMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,), nn.SyncBatchNorm: (2, 3, 4, 5),
}  # fmt: skip
_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def keeps_shape(m: nn.Module) -> bool:
    """Whether the layer's result has the shape of its input."""
    return type(m) in _BATCH_NORMS or type(m) in activations.LAYERS


def known_result(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result, or None for a layer or a call that has to be run to know: where anything is unusual, or wrong."""
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return None
    x, kind = args[0], type(m)
    device = x.device.type
    if not _is_plain(x) or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    if kind in _BATCH_NORMS:
        return _batch_norm(m, x)
    if kind in _CONVOLUTIONS:
        return _convolution(m, x, _CONVOLUTIONS[kind])
    if kind in activations.LAYERS and x.is_floating_point():
        if getattr(m, "inplace", False) is True:
            torch.autograd.graph.increment_version(x)
            return x
        return _like(x, x.shape)
    return None


def _batch_norm(m: Any, x: Tensor) -> Tensor | None:
    """With batch statistics: a layer that averages cumulatively (momentum=None) reads a counter's value otherwise."""
    by_batch = m.training or m.running_mean is None
    fits = x.dim() in _BATCH_NORMS[type(m)] and x.shape[1] == m.num_features and x.numel() > x.shape[1]
    vectors = [v for v in (m.weight, m.bias, m.running_mean, m.running_var) if v is not None]
    plain = all(v.device == x.device and v.dtype in (x.dtype, torch.float32) and v.numel() == x.shape[1] for v in vectors)
    return _like(x, x.shape) if by_batch and fits and plain and x.is_floating_point() else None


def _convolution(m: Any, x: Tensor, dimensions: int) -> Tensor | None:
    w = m.weight
    fits = x.dim() == dimensions + 2 and x.shape[1] == m.in_channels and w.shape[:2] == (m.out_channels, m.in_channels // m.groups)
    if not fits or not _is_plain(w) or isinstance(m.padding, str) or m.padding_mode != "zeros":
        return None
    if w.device != x.device or w.dtype != x.dtype:
        return None
    if m.bias is not None and (m.bias.device != x.device or m.bias.dtype != x.dtype):
        return None
    if dimensions == 3 and not (x.is_contiguous() and w.is_contiguous()):
        return None  # the layout depends on the library that convolves, and that on the batch size
    numbers = [tuple(given) * (len(x.shape) - 2 if len(given) == 1 else 1) for given in (m.stride, m.padding, m.dilation)]
    sizes = zip(x.shape[2:], w.shape[2:], *numbers, strict=True)
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    if min(spatial) < 1 or x.numel() == 0:
        return None
    return _like(w if is_channels_last(w) else x, (x.shape[0], m.out_channels, *spatial))


def _is_plain(x: Tensor) -> bool:
    """Whether it is laid out one of the two usual ways, to the stride: where sizes of one leave a doubt, PyTorch goes by strides."""
    if x.stride() == make_contiguous_strides_for(x.shape):
        return True
    return is_channels_last(x) and x.stride() == make_channels_last_strides_for(x.shape)


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape with the dtype, device and order of dimensions of x."""
    if not is_channels_last(x):
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    n, c, *spatial = shape
    return torch.empty((n, *spatial, c), dtype=x.dtype, device=x.device).movedim(-1, 1)
