"""Convolutions that a verification does not leave to PyTorch. Both sides of it, the original and the restructured model, use these.

Weight gradients that would overrun memory. The original runs in channels_last here whatever it was trained in, so a fault of that
format would be the verification's (kernels/aten_convolution.py).

Depthwise convolutions in float64, so that verifying a MobileNet takes seconds. PyTorch has no float64 kernel for grouped convolutions
on the CPU: it convolves group by group, hundreds of calls for one layer. A depthwise convolution is a sum over the kernel's positions of
shifted inputs times per-channel weights; that sum, and its two gradients, take one elementwise operation for each position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.kernels.aten_convolution import sampled_weight_gradient, weight_gradient_overruns

__all__ = ["own_convolution"]

aten = torch.ops.aten


def own_convolution(func: Any, args: tuple[Any, ...]) -> Any:
    """The result of ``func(*args)`` if it is one of the above, on the CPU; None where PyTorch is to compute it."""
    if func is aten.convolution.default:
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        if not _applies(x, weight, transposed, groups):
            return None
        padded, shape = _pad(x, padding), _output_shape(x, weight, stride, padding, dilation)
        y = x.new_zeros(shape)
        for position, window in _windows(weight, shape, stride, dilation):
            y += padded[window] * _column(weight, position)
        return y if bias is None else y + bias.view(1, -1, *[1] * len(stride))
    if func is aten.convolution_backward.default:
        dy, x, weight, _, stride, padding, dilation, transposed, _, groups, needs = args
        if _applies(x, weight, transposed, groups):
            return _backward(dy, x, weight, stride, padding, dilation, needs)
        if (needs[1] or needs[2]) and not transposed and weight_gradient_overruns(x, weight, stride, padding):
            dx, _, _ = func(*args[:-1], [needs[0], False, False])  # with the bias's gradient oneDNN takes the weight's, asked for or not
            return dx, sampled_weight_gradient(dy, x, weight, stride) if needs[1] else None, _bias_gradient(dy) if needs[2] else None
    return None


def _applies(x: Tensor, weight: Tensor, transposed: bool, groups: int) -> bool:
    depthwise = groups > 1 and groups == x.shape[1] == weight.shape[0] and weight.shape[1] == 1
    return depthwise and not transposed and x.dtype is torch.float64 and x.device.type == "cpu"


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    padded = _pad(x, padding)
    dx = torch.zeros_like(padded) if needs[0] else None
    dweight = torch.zeros_like(weight) if needs[1] else None
    others = [d for d in range(dy.dim()) if d != 1]
    for position, window in _windows(weight, tuple(dy.shape), stride, dilation):
        if dx is not None:
            dx[window] += dy * _column(weight, position)
        if dweight is not None:
            dweight[_at(position)] = (dy * padded[window]).sum(others)
    if dx is not None:
        for d, (p, n) in enumerate(zip(padding, x.shape[2:], strict=True)):
            dx = dx.narrow(d + 2, p, n)
    return dx, dweight, _bias_gradient(dy) if needs[2] else None


def _bias_gradient(dy: Tensor) -> Tensor:
    return dy.sum([d for d in range(dy.dim()) if d != 1])


def _pad(x: Tensor, padding: Any) -> Tensor:
    return F.pad(x, [p for p in reversed(padding) for _ in range(2)])


def _output_shape(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...]:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return (*x.shape[:2], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes))


def _windows(
    weight: Tensor, shape: tuple[int, ...], stride: Any, dilation: Any
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(kernel position, the index of the part of the padded input that it meets)."""
    for position in itertools.product(*map(range, weight.shape[2:])):
        starts = [k * d for k, d in zip(position, dilation, strict=True)]
        slices = (slice(start, start + (n - 1) * s + 1, s) for start, n, s in zip(starts, shape[2:], stride, strict=True))
        yield position, (..., *slices)


def _at(position: tuple[int, ...]) -> Any:
    return (slice(None), 0, *position)


def _column(weight: Tensor, position: tuple[int, ...]) -> Tensor:
    """One weight a channel, [1, C, 1 ...]."""
    return weight[_at(position)].view(1, -1, *[1] * len(position))
