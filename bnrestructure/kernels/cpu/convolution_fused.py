"""The dense convolution with everything inside it: prologue, product and epilogue tile by tile (src/conv_forward.cpp,
src/conv_backward.cpp). ``kernel`` is another C function with the same arguments (convolution_winograd.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels.cpu import layout, library
from bnrestructure.kernels.cpu.convolution_arguments import backward_arguments, forward_arguments, named_sums, pixels
from bnrestructure.kernels.layout import pitch_of
from bnrestructure.kernels.rounding import gradient_factor

__all__ = ["conv_backward", "conv_forward"]

_forward = library.declare("bnr_conv_forward", "p")
_backward = library.declare("bnr_conv_backward", "p")


def conv_forward(
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    statistics: bool,
    out: Tensor | None = None,
    join: Join | None = None,
    kernel: library.Kernel = _forward,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var) as kernels/reference says; x and the weight are float32 or bfloat16.

    With ``join`` x, channels_last in ``dtype``, is written first: the join's sum. Only for 1x1 kernels without stride and padding.
    """
    y, pitch = out, 0
    if out is not None and out.dtype is dtype:
        pitch = pitch_of(out)
    if y is None or not pitch:
        size = geometry.output_size(x.shape[2:], weight.shape[2:])
        y, pitch = kept_activation((x.shape[0], weight.shape[0], *size), dtype, x.device), weight.shape[0]
    mean, var = torch.empty(2, weight.shape[0]) if statistics else (None, None)
    keep: list[Tensor | None] = []
    bias = None if bias is None else bias.to(dtype)
    kernel(forward_arguments(pixels(x, dtype), transform, weight, bias, geometry, (y, pitch), mean, var, keep, join))
    if out is not None and y is not out:
        y = out.copy_(y)
    return y, mean, var


def conv_backward(
    dy: Tensor,
    edge: BackwardEdge,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    accumulate: Tensor | None = None,
    join: Join | None = None,
    kernel: library.Kernel = _backward,
) -> ConvGradients:
    """The gradients as kernels/reference says; dy, x and the weight are float32 or bfloat16. x is ``join``'s sum where there is one."""
    need_x, need_weight, need_bias = needs
    dx = sums = gate = None
    px = pixels(x, dtype)
    adds = False
    if need_x:
        dx = layout.destination(px[0], accumulate)
        adds = dx is accumulate
        if join is not None:
            sums = torch.empty(3, x.shape[1])
            if accumulate is not None and not adds:  # the mask comes after the sum
                accumulate, adds = dx.copy_(accumulate), True
        elif transform.gate is not None:
            gate = torch.empty(transform.gate.shape)
        elif transform.mean is not None:
            sums = torch.empty(2, x.shape[1])
    dw = torch.empty_like(weight) if need_weight else None
    db = torch.empty(weight.shape[0]) if need_bias else None
    keep: list[Tensor | None] = []
    kernel(
        backward_arguments(
            pixels(dy, dtype),
            edge,
            None if edge.a is None or edge.y is None else pixels(edge.y, dtype),
            px,
            transform,
            weight,
            geometry,
            keep,
            dx=None if dx is None else (dx, pitch_of(dx)),
            accumulate=adds,
            sums=sums,
            gate=gate,
            weight_gradient=dw,
            bias_gradient=db,
            factor=gradient_factor(edge.a is not None, dtype, torch.float32),
            join=join if need_x else None,
        )
    )
    if dx is not None and dx is not accumulate:
        dx = dx.to(x.dtype) if accumulate is None else accumulate.add_(dx.to(accumulate.dtype))
    return ConvGradients(
        dx,
        **named_sums(sums, join),
        gate=None if gate is None or transform.gate is None else gate.to(transform.gate.dtype),
        weight=dw,
        bias=None if db is None else db.to(dtype),
    )
