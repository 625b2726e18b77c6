"""ATen's convolution backward, for the implementations that are built around it, with what it leaves out made good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # ops imports the kernels
    from bnrestructure.ops.edges import ConvGeometry

__all__ = ["convolution_backward"]


def convolution_backward(
    dy: Tensor, z: Tensor, weight: Tensor, geometry: ConvGeometry, *, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients at the convolution's input z [N, C_in, *spatial] and at its weight, both in dy's dtype; None where not needed.

    On the CPU, oneDNN's weight gradient in 16-bit dtypes does not write the positions of the kernel that meet nothing but padding
    (a 5 x 5 kernel padded by 2 over a single pixel has 24 of them): what lay in memory comes back. It is taken in float32 there.
    """
    rest = geometry.aten_arguments
    backward = torch.ops.aten.convolution_backward
    wide = need_weight and dy.device.type == "cpu" and dy.dtype.itemsize == 2 and _has_idle_positions(geometry, z, weight)
    g, dw, _ = backward(dy, z, weight, None, *rest, [need_input, need_weight and not wide, False])
    if wide:
        dw = backward(dy.float(), z.float(), weight.float(), None, *rest, [False, True, False])[1].to(dy.dtype)
    return g, dw


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
