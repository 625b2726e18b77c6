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
from bnrestructure.kernels.layout import vector

__all__ = ["Pixels", "backward_arguments", "forward_arguments", "named_sums", "pixels"]

# Every field is eight bytes wide; all but the slope and the gradient factor are integers or pointers.
_PROBLEM = "26qd5q"
_pack_forward = struct.Struct(_PROBLEM + "5q11qd").pack
_pack_backward = struct.Struct(_PROBLEM + "20qd11qdq").pack

#: An activation tensor that a kernel can address, and its pixel pitch in elements.
Pixels = tuple[Tensor, int]


def pixels(x: Tensor, dtype: torch.dtype) -> Pixels:
    """``x`` in ``dtype``, copied to channels_last where it is laid out differently."""
    return layout.addressable(x.to(dtype))


def _problem(
    x: Pixels,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    out_size: tuple[int, ...],
    keep: list[Tensor | None],
) -> tuple[int | float, ...]:
    """The fields of ``struct Problem``. Vectors that had to be converted are put into ``keep``."""
    tensor, pitch = x
    vectors = [vector(v) for v in (transform.mean, transform.scale, transform.beta, transform.gate)]
    keep += vectors
    act, slope = layout.activation_code(transform.act)
    channels_out, _, kernel_h, kernel_w = weight.shape
    return (
        *tensor.shape, channels_out, *out_size, kernel_h, kernel_w,
        *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups,
        tensor.dtype is torch.bfloat16, weight.dtype is torch.bfloat16, library.threads(),
        tensor.data_ptr(), pitch, *map(_address, vectors), act, slope,
        weight.data_ptr(), *weight.stride(),
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
) -> bytes:
    """``struct ForwardArguments``. ``keep`` gains every tensor that may be a copy made for this call. With ``join`` x is written."""
    tensor, pitch = y
    bias = vector(bias)
    keep += [bias, x[0], tensor]
    problem = _problem(x, transform, weight, geometry, tensor.shape[2:], keep)
    join_fields = _join(join, x[0].dtype, keep)
    return _pack_forward(*problem, _address(bias), tensor.data_ptr(), pitch, _address(mean), _address(var), *join_fields)


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
) -> bytes:
    """``struct BackwardArguments``. ``y`` is the edge's y; ``sums`` [2, C_in], or [3, C_in] with a join, takes SP, SPX and SPR;
    ``factor`` is the gradient factor.

    ``keep`` gains every tensor that may be a copy made for this call. The rest is as the C names say.
    """
    gradient, pitch = dy
    y_tensor, y_pitch = y or (None, 0)
    dx_tensor, dx_pitch = dx or (None, 0)
    vectors = [vector(v) for v in (edge.s, edge.a, edge.b, edge.mean if y else None)]
    keep += [*vectors, gradient, y_tensor, x[0]]
    sum_p = _address(sums)
    sum_px = 0 if sums is None else sum_p + 4 * sums.shape[1]
    strides = (0, 0, 0, 0) if weight_gradient is None else weight_gradient.stride()
    return _pack_backward(
        *_problem(x, transform, weight, geometry, gradient.shape[2:], keep),
        gradient.data_ptr(), pitch, *map(_address, vectors[:3]), _address(y_tensor), y_pitch, _address(vectors[3]),
        _address(dx_tensor), dx_pitch, accumulate, sum_p, sum_px, _address(gate),
        _address(weight_gradient), *strides, _address(bias_gradient), factor,
        *_join(join, gradient.dtype, keep), sum_px + 4 * sums.shape[1] if join is not None and sums is not None else 0,
    )  # fmt: skip


def named_sums(sums: Tensor | None, join: Join | None) -> dict[str, Tensor | None]:
    """The rows of ``sums``, SP, SPX and SPR, as :class:`ConvGradients` calls them, without those that do not apply."""
    if sums is None:
        return {}
    if join is None:
        return {"sum_p": sums[0], "sum_px": sums[1]}
    sum_px, sum_pr = (None if t.mean is None else sums[i] for i, t in ((1, join.ty), (2, join.tr)))
    return {"sum_p": sums[0], "sum_px": sum_px, "sum_pr": sum_pr}


def _join(join: Join | None, dtype: torch.dtype, keep: list[Tensor | None]) -> tuple[int | float, ...]:
    """The fields of ``struct Join``."""
    if join is None:
        return (*[0] * 11, 0.0)
    fields: list[int] = []
    for x, transform in ((join.y, join.ty), (join.r, join.tr)):
        tensor, pitch = pixels(x, dtype)
        vectors = [vector(v) for v in (transform.mean, transform.scale, transform.beta)]
        keep += [tensor, *vectors]
        fields += [tensor.data_ptr(), pitch, *map(_address, vectors)]
    return *fields, *layout.activation_code(join.act)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
