"""The fused depthwise convolution on CPU: ``kernels/reference/convolution.py`` for groups == C_in == C_out, in 2-D."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.activation import unsupported_activation
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Transform
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels.cpu import library
from bnrestructure.kernels.cpu.layout import (
    ELEMENT_CODES,
    activation_code,
    addressable,
    destination,
)
from bnrestructure.kernels.cpu.memory import of_pixels, of_vector, of_weight
from bnrestructure.kernels.layout import pitch_of, vector
from bnrestructure.kernels.operands import readable
from bnrestructure.kernels.rounding import narrowed

__all__ = ["conv_backward", "conv_forward", "is_depthwise", "supports"]

_forward = library.declare("bnr_depthwise_forward", "p")
_backward = library.declare("bnr_depthwise_backward", "p")

# The structures of src/depthwise_arguments.h, field by field; a null pointer is 0.
_PROBLEM = "14q q 3q Qq 3Q Q q d Q 3q"
_FORWARD = struct.Struct(f"={_PROBLEM} Q Qq 2Q".replace(" ", ""))
_BACKWARD = struct.Struct(f"={_PROBLEM} Qq 3Q Qq Q Qq q 2Q Q Q 3q Q".replace(" ", ""))


def is_depthwise(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether every channel is convolved with one filter of its own."""
    return geometry.groups == x.shape[1] == weight.shape[0]


def supports(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why ``conv_forward`` or ``conv_backward`` cannot run these arguments, in one line; None when it can."""
    if name == "conv_forward":
        x, transform, weight, _, geometry = args[:5]
        written = kwargs.get("out")
    else:
        _, _, x, transform, weight, geometry = args[:6]
        written = kwargs.get("accumulate")
    if x.dim() != 4:
        return f"only 2-D convolutions have a CPU kernel, this one is {x.dim() - 2}-D"
    if not is_depthwise(x, weight, geometry):
        return "not a depthwise convolution (groups == input channels == output channels)"
    if x.numel() == 0:
        return "the input is empty"
    for tensor, what in ((x, "input"), (weight, "weight"), (written, "destination")):
        if tensor is not None and tensor.dtype not in ELEMENT_CODES:
            return f"the {what} is {tensor.dtype}; the CPU kernels take float32 and bfloat16"
    if kwargs["dtype"] not in ELEMENT_CODES:
        return f"computing in {kwargs['dtype']}; the CPU kernels take float32 and bfloat16"
    if transform.gate is not None and transform.gate.shape != x.shape[:2]:
        return "the gate is not one factor a channel of each image"
    return narrowed(x, transform, kwargs["dtype"]) or geometry.misfit(x.shape, weight.shape) or unsupported_activation(transform.act)


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``y = conv(transform(x), weight) + bias`` and y's biased statistics, in one sweep.

    x [N, C, H, W] and the weight [C, 1, kh, kw] are float32 or bfloat16, each its own; y [N, C, H_out, W_out] is in
    ``dtype``, channels_last, or written to ``out`` (any strides). mean and var are float32 [C] of y as stored, or None
    without ``statistics``. The weight is not rounded to ``dtype``, and all arithmetic is float32.
    """
    size = geometry.output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
    y = out
    if y is None or y.dtype is not dtype or not pitch_of(y):
        y = kept_activation((x.shape[0], x.shape[1], *size), dtype, x.device)
    mean = var = None
    if statistics:
        mean, var = torch.empty((2, x.shape[1]), dtype=torch.float32).unbind()
    problem, keep = _problem(x, transform, weight, geometry, size, dtype)
    bias = vector(bias)
    channels, pitch = x.shape[1], pitch_of(y)
    to = of_pixels(y, pitch, (x.shape[0], channels, *size), dtype), pitch
    _forward(_FORWARD.pack(*problem, of_vector(bias, channels), *to, of_vector(mean, channels), of_vector(var, channels)))
    del keep
    return (y if out is None or y is out else out.copy_(y)), mean, var


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
) -> ConvGradients:
    """Gradients of :func:`conv_forward`; ``needs`` = (dx and the sums, weight, bias).

    ``dy`` [N, C, H_out, W_out] is the edge's P, of any strides. ``accumulate``, of x's shape, is added to in place and
    returned as ``dx``; without it dx is fresh, channels_last, in x's dtype. The sums are float32, the gate's gradient
    is in the gate's dtype.
    """
    need_x, need_weight, need_bias = needs
    channels = x.shape[1]
    size = geometry.output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
    shape_out = (x.shape[0], channels, *size)
    problem, keep = _problem(x, transform, weight, geometry, size, dtype)
    dy, dy_pitch = addressable(readable(dy).to(dtype))
    s, a, b, y_mean = vector(edge.s), vector(edge.a), vector(edge.b), None
    y, y_pitch = None, 0
    if a is not None and edge.y is not None:
        y, y_pitch = addressable(readable(edge.y).to(dtype))
        y_mean = vector(edge.mean)
    dx = dw = db = gate = sum_p = sum_px = None
    if need_x:
        dx = destination(x, accumulate)
        if transform.gate is not None:
            gate = torch.empty(x.shape[:2], dtype=torch.float32)
        elif transform.mean is not None:
            sum_p, sum_px = torch.empty((2, channels), dtype=torch.float32).unbind()
    if need_weight:
        dw = torch.empty_like(weight)
    if need_bias:
        db = torch.empty(channels, dtype=torch.float32)
    dx_pitch = 0 if dx is None else pitch_of(dx)
    _backward(
        _BACKWARD.pack(
            *problem,
            of_pixels(dy, dy_pitch, shape_out, dtype), dy_pitch,
            of_vector(s, channels), of_vector(a, channels), of_vector(b, channels),
            of_pixels(y, y_pitch, shape_out, dtype), y_pitch,
            of_vector(y_mean, channels),
            of_pixels(dx, dx_pitch, x.shape, x.dtype), dx_pitch,
            dx is not None and dx is accumulate,
            of_vector(sum_p, channels), of_vector(sum_px, channels),
            of_vector(gate, *x.shape[:2]),
            of_weight(dw, weight.shape, weight.dtype), *(_filter_strides(dw) if dw is not None else (0, 0, 0)),
            of_vector(db, channels),
        )
    )  # fmt: skip
    del keep
    if dx is not None and accumulate is not None and dx is not accumulate:
        dx = accumulate.add_(dx)
    gate = None if gate is None or transform.gate is None else gate.to(transform.gate.dtype)
    db = None if db is None else db.to(dtype)
    return ConvGradients(dx=dx, sum_p=sum_p, sum_px=sum_px, gate=gate, weight=dw, bias=db)


def _problem(
    x: Tensor, transform: Transform, weight: Tensor, geometry: ConvGeometry, size: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[int | float, ...], tuple[Tensor | None, ...]]:
    """The fields of Problem, and the tensors whose memory they point to."""
    x, pitch = addressable(x)
    vectors = vector(transform.mean), vector(transform.scale), vector(transform.beta), vector(transform.gate)
    act, slope = activation_code(transform.act)
    channels = x.shape[1]
    fields = (
        *x.shape,
        *size,
        *weight.shape[2:],
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        library.threads(),
        ELEMENT_CODES[x.dtype], ELEMENT_CODES[dtype], ELEMENT_CODES[weight.dtype],
        of_pixels(x, pitch, x.shape, x.dtype), pitch,
        *(of_vector(v, channels) for v in vectors[:3]), of_vector(vectors[3], *x.shape[:2]),
        act, slope,
        of_weight(weight, (channels, 1, *weight.shape[2:]), weight.dtype), *_filter_strides(weight),
    )  # fmt: skip
    return fields, (x, *vectors)


def _filter_strides(weight: Tensor) -> tuple[int, int, int]:
    """Strides of the channel, the kernel row and the kernel column of [C, 1, kh, kw]."""
    channel, _, row, column = weight.stride()
    return channel, row, column
