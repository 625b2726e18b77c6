"""A dense convolution's arguments as the C kernels take them: the structures of src/conv_arguments.h, field by field.

They hold addresses only, so every function that makes one puts the tensors behind it into ``keep``; the caller holds
on to ``keep`` until the kernel has returned.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.kernels.cpu import layout, library
from bnrestructure.kernels.cpu.memory import UnexpectedTensorError, of_pixels, of_vector, of_weight
from bnrestructure.kernels.layout import vector
from bnrestructure.kernels.operands import readable

__all__ = ["Pixels", "backward_arguments", "forward_arguments", "named_sums", "pixels"]

# Every field is eight bytes wide; all but the slope and the gradient factor are integers or pointers.
_PROBLEM = "26qd5q"
_pack_forward = struct.Struct(_PROBLEM + "5q11qd").pack
_pack_backward = struct.Struct(_PROBLEM + "20qd11qdq").pack

#: An activation tensor that a kernel can address, and its pixel pitch in elements.
Pixels = tuple[Tensor, int]


def pixels(x: Tensor, dtype: torch.dtype) -> Pixels:
    """``x`` in ``dtype``, copied to channels_last where it is laid out differently."""
    return layout.addressable(x if x.dtype is dtype else readable(x).to(dtype))


def _problem(
    x: Pixels,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    keep: list[Tensor | None],
) -> tuple[int | float, ...]:
    """The fields of ``struct Problem``. Vectors that had to be converted are put into ``keep``."""
    tensor, pitch = x
    batch, channels, *size = tensor.shape
    vectors = [vector(v) for v in (transform.mean, transform.scale, transform.beta, transform.gate)]
    keep += vectors
    act, slope = layout.activation_code(transform.act)
    channels_out, _, *kernel = weight.shape
    if weight.shape[1] * geometry.groups != channels or channels_out % geometry.groups:
        raise UnexpectedTensorError(f"a weight of shape {list(weight.shape)} in {geometry.groups} groups, for {channels} channels")
    return (
        *tensor.shape, channels_out, *geometry.output_size(tuple(size), tuple(kernel)), *kernel,
        *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups,
        tensor.dtype is torch.bfloat16, weight.dtype is torch.bfloat16, library.threads(),
        of_pixels(tensor, pitch, tensor.shape, tensor.dtype), pitch,
        *(of_vector(v, channels) for v in vectors[:3]), of_vector(vectors[3], batch, channels), act, slope,
        of_weight(weight, weight.shape, weight.dtype), *weight.stride(),
    )  # fmt: skip


def forward_arguments(
    x: Pixels,
    transform: Transform,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    y: Pixels,
    mean: Tensor | None,
    var: Tensor | None,
    keep: list[Tensor | None],
    join: Join | None = None,
    prologue: bool = False,
) -> bytes:
    """``struct ForwardArguments``. ``keep`` gains every tensor that may be a copy made for this call. With ``join`` x is written.

    ``prologue``: y takes the transformed input, and has x's shape.
    """
    tensor, pitch = y
    bias = vector(bias)
    keep += [bias, x[0], tensor]
    problem = _problem(x, transform, weight, geometry, keep)
    out = weight.shape[0]
    shape = x[0].shape if prologue else output_shape(x[0], weight, geometry)
    return _pack_forward(
        *problem, of_vector(bias, out), of_pixels(tensor, pitch, shape, x[0].dtype), pitch, of_vector(mean, out), of_vector(var, out),
        *_join(join, x[0], keep),
    )  # fmt: skip


def output_shape(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """[N, C_out, H_out, W_out] of the convolution of x."""
    return x.shape[0], weight.shape[0], *geometry.output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))


def backward_arguments(
    dy: Pixels,
    edge: BackwardEdge,
    y: Pixels | None,
    x: Pixels,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    keep: list[Tensor | None],
    *,
    dx: Pixels | None = None,
    accumulate: bool = False,
    sums: Tensor | None = None,
    gate: Tensor | None = None,
    weight_gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    factor: float = 1.0,
    join: Join | None = None,
    whole: str = "both",
) -> bytes:
    """``struct BackwardArguments``. ``y`` is the edge's y; ``sums`` [2, C_in], or [3, C_in] with a join, takes SP, SPX and SPR;
    ``factor`` is the gradient factor.

    ``keep`` gains every tensor that may be a copy made for this call. The rest is as the C names say. ``whole``: "both" the gradients at
    the output and at the input are there, or only that at the "output" (dx has its shape) or at the "input" (dy has its shape).
    """
    gradient, pitch = dy
    y_tensor, y_pitch = y or (None, 0)
    dx_tensor, dx_pitch = dx or (None, 0)
    vectors = [vector(v) for v in (edge.s, edge.a, edge.b, edge.mean if y else None)]
    keep += [*vectors, gradient, y_tensor, x[0]]
    source, out, dtype = x[0], weight.shape[0], gradient.dtype
    batch, channels = source.shape[:2]
    shape, shape_out = tuple(source.shape), output_shape(source, weight, geometry)
    dy_shape, dx_shape = (shape_out if whole != "input" else shape), (shape if whole != "output" else shape_out)
    rows = 3 if join is not None else 2
    sum_p = of_vector(sums, rows, channels)
    sum_px = sum_p + 4 * channels if sum_p else 0
    strides = (0, 0, 0, 0) if weight_gradient is None else weight_gradient.stride()
    return _pack_backward(
        *_problem(x, transform, weight, geometry, keep),
        of_pixels(gradient, pitch, dy_shape, dtype), pitch, *(of_vector(v, out) for v in vectors[:3]),
        of_pixels(y_tensor, y_pitch, shape_out, dtype), y_pitch, of_vector(vectors[3], out),
        of_pixels(dx_tensor, dx_pitch, dx_shape, dtype), dx_pitch, accumulate, sum_p, sum_px, of_vector(gate, batch, channels),
        of_weight(weight_gradient, weight.shape, weight.dtype), *strides, of_vector(bias_gradient, out), factor,
        *_join(join, source, keep), sum_px + 4 * channels if join is not None and sum_p else 0,
    )  # fmt: skip


def named_sums(sums: Tensor | None, join: Join | None) -> dict[str, Tensor | None]:
    """The rows of ``sums``, SP, SPX and SPR, as :class:`ConvGradients` calls them, without those that do not apply."""
    if sums is None:
        return {}
    if join is None:
        return {"sum_p": sums[0], "sum_px": sums[1]}
    sum_px, sum_pr = (None if t.mean is None else sums[i] for i, t in ((1, join.ty), (2, join.tr)))
    return {"sum_p": sums[0], "sum_px": sum_px, "sum_pr": sum_pr}


def _join(join: Join | None, x: Tensor, keep: list[Tensor | None]) -> tuple[int | float, ...]:
    """The fields of ``struct Join``."""
    if join is None:
        return (*[0] * 11, 0.0)
    fields: list[int] = []
    for operand, transform in ((join.y, join.ty), (join.r, join.tr)):
        tensor, pitch = pixels(operand, x.dtype)
        vectors = [vector(v) for v in (transform.mean, transform.scale, transform.beta)]
        keep += [tensor, *vectors]
        fields += [of_pixels(tensor, pitch, tuple(x.shape), x.dtype), pitch, *(of_vector(v, x.shape[1]) for v in vectors)]
    return *fields, *layout.activation_code(join.act)
