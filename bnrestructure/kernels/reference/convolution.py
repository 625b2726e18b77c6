"""The fused convolution, forward and backward, over ATen's convolution (1-D, 2-D and 3-D, any dtype and device)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bnrestructure.core.edges import ConvGradients, Transform
from bnrestructure.kernels.aten_convolution import convolution_backward
from bnrestructure.kernels.calls import (
    Call,
    ConvBackward,
    ConvForward,
    ConvResult,
    JoinBackward,
    JoinForward,
    OutputGradient,
    OutputGradientResult,
    StatisticsForward,
)
from bnrestructure.kernels.reference.elementwise import apply_transform, channel_sum, gated, input_gradient, output_gradient, write
from bnrestructure.kernels.reference.statistics import statistics_forward
from bnrestructure.kernels.reference.sweeps import join_backward, join_forward
from bnrestructure.kernels.rounding import gradient_factor, restored

__all__ = ["RUN"]


def conv_forward(call: ConvForward) -> ConvResult:
    """``y = conv(act((x - mean) * scale + beta) * gate, weight) + bias``, and y's statistics where they are wanted."""
    if call.join is not None:
        z = join_forward(JoinForward(call.join, call.dtype)).z
        call.x.as_strided_(z.shape, z.stride()).copy_(z)  # laid out as PyTorch's add would, and what is made of it is, too
    z = apply_transform(call.x, call.transform, call.dtype)
    bias = None if call.bias is None else call.bias.to(call.dtype)
    y = torch.convolution(z, call.weight.to(call.dtype), bias, *call.geometry.aten_arguments)
    if call.out is not None:
        y = call.out.copy_(y)
    mean, var = statistics_forward(StatisticsForward(y)) if call.statistics else (None, None)
    return ConvResult(y, mean, var)


def conv_backward(call: ConvBackward) -> ConvGradients:
    """The gradients at x, weight, bias and gate, and the sums over pixels for the prologue's vectors."""
    if call.join is not None:
        return _behind_join(call)
    x, transform, weight, dtype = call.x, call.transform, call.weight, call.dtype
    need_x, need_weight, need_bias = call.needs
    exact = output_gradient(call.dy, call.edge)
    factor = gradient_factor(call.edge.a is not None, dtype, exact.dtype)
    d = (exact if factor == 1 else exact * factor).to(dtype)
    z = apply_transform(x, transform, dtype) if need_weight or need_x else x
    g, dw = convolution_backward(d, z, weight.to(dtype), call.geometry, need_input=need_x, need_weight=need_weight)
    dw = None if dw is None else restored(dw, factor, weight.dtype)
    # Before rounding: that of a bias in front of a batch norm is zero, and what is rounded off would be all that is left of it.
    db = channel_sum(exact).to(dtype) if need_bias else None
    if g is None:
        return ConvGradients(weight=dw, bias=db)
    if factor != 1:
        g = restored(g, factor, exact.dtype)
    if transform.gate is not None:
        dx, dgate = gated(g, x, transform)
        return ConvGradients(dx=write(dx, x.dtype, call.accumulate), gate=dgate, weight=dw, bias=db)
    dx, sum_p, sum_px = (g, None, None) if transform.is_identity else input_gradient(g, x, transform)
    return ConvGradients(dx=write(dx, x.dtype, call.accumulate), sum_p=sum_p, sum_px=sum_px, weight=dw, bias=db)


def _behind_join(call: ConvBackward) -> ConvGradients:
    """The convolution's gradients, then the join's of what that found for its sum."""
    found = conv_backward(replace(call, transform=Transform(), join=None))
    if found.dx is None or call.join is None:
        return found
    g, sum_p, sum_py, sum_pr = join_backward(JoinBackward(found.dx, None, call.join, call.x))
    return ConvGradients(g, sum_p, sum_py, None, found.weight, found.bias, sum_pr)


def output_gradient_sweep(call: OutputGradient) -> OutputGradientResult:
    """``dY = s * P + a * (y - mean) + b``, stored, and its sum over pixels, the gradient at the bias."""
    exact = output_gradient(call.dy, call.edge)
    return OutputGradientResult((exact * call.factor).to(call.dtype), channel_sum(exact) if call.bias else None)


#: What answers each call.
RUN: dict[type[Call[Any]], Callable[[Any], Any]] = {
    ConvForward: conv_forward,
    ConvBackward: conv_backward,
    OutputGradient: output_gradient_sweep,
}
