"""ATen's convolution backward, for the implementations that are built around it, without the faults of the library under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry

__all__ = ["convolution_backward", "sampled_weight_gradient", "weight_gradient_overruns"]

#: Channels in a vector of oneDNN's AVX-512 kernels (half as many with AVX2).
_VECTOR = 16


def convolution_backward(
    dy: Tensor, z: Tensor, weight: Tensor, geometry: ConvGeometry, *, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients at the convolution's input z [N, C_in, *spatial] and at its weight, both in dy's dtype; None where not needed.

    On the CPU, oneDNN's weight gradient in 16-bit dtypes does not write the positions of the kernel that meet nothing but padding
    (a 5 x 5 kernel padded by 2 over a single pixel has 24 of them), nor all of those of a volume that is less deep than the kernel: what
    lay in memory comes back. It is taken in float32 there.
    Where :func:`weight_gradient_overruns`, the pixels that a 1x1 kernel reads are gathered first.
    """
    rest = geometry.aten_arguments
    backward = torch.ops.aten.convolution_backward
    narrow = need_weight and dy.device.type == "cpu" and dy.dtype.itemsize == 2
    wide = narrow and (_has_idle_positions(geometry, z, weight) or _is_shallow(geometry, z, weight))
    sampled = need_weight and weight_gradient_overruns(z, weight, geometry.stride, geometry.padding)
    g, dw, _ = backward(dy, z, weight, None, *rest, [need_input, need_weight and not (wide or sampled), False])
    if sampled:
        dw = sampled_weight_gradient(dy, z, weight, geometry.stride)
    elif wide:
        dw = backward(dy.float(), z.float(), weight.float(), None, *rest, [False, True, False])[1].to(dy.dtype)
    return g, dw


def weight_gradient_overruns(z: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether oneDNN would write past the memory of its own that it gathers a 1x1 kernel's pixels in: other tensors change, or the process
    dies. It does so with a stride, over channels_last images (from 80 x 80 on, stride 2) of fewer channels than a vector has.

    https://github.com/uxlfoundation/oneDNN/issues/6035
    """
    pointwise = all(k == 1 for k in weight.shape[2:]) and any(s > 1 for s in stride) and not any(padding)
    return pointwise and z.device.type == "cpu" and 1 < z.shape[1] < _VECTOR and weight.shape[1] == z.shape[1]


def sampled_weight_gradient(dy: Tensor, z: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """The weight gradient of a 1x1 convolution [N, C_in, *spatial] -> dy's shape without padding, from the pixels that it reads."""
    steps: tuple[Any, ...] = tuple(slice(None, None, s) for s in stride)
    read = z[(..., *steps)]
    ones, zeros = [1] * len(stride), [0] * len(stride)
    arguments = None, ones, zeros, ones, False, zeros, 1
    return torch.ops.aten.convolution_backward(dy, read, weight, *arguments, [False, True, False])[1]


def _is_shallow(geometry: ConvGeometry, z: Tensor, weight: Tensor) -> bool:
    """Whether z [N, C, D, H, W] is less deep than the kernel reaches."""
    return z.dim() == 5 and z.shape[2] <= geometry.dilation[0] * (weight.shape[2] - 1)


def _has_idle_positions(geometry: ConvGeometry, z: Tensor, weight: Tensor) -> bool:
    """Whether some position of the kernel meets no element of z for any output."""
    size, kernel = tuple(z.shape[2:]), tuple(weight.shape[2:])
    sizes = zip(size, kernel, geometry.output_size(size, kernel), geometry.stride, geometry.padding, geometry.dilation, strict=True)
    for n, k, outputs, stride, padding, dilation in sizes:
        for offset in (i * dilation - padding for i in range(k)):
            first = max(0, -(offset // stride))  # the first output whose element is not left of z
            if first >= outputs or first * stride + offset >= n:
                return True
    return False
