"""The sweeps that ride on no convolution: statistics, normalise, residual join, max pooling, squeeze (global average), output gradient.

For 4-D tensors in fp32 or bf16; :func:`unsupported` says what is not. Inputs of any strides are accepted, those that are not channels_last
at the price of a copy.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.activation import unsupported_activation
from bnrestructure.core.edges import PoolGeometry, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import (
    Call,
    JoinBackward,
    JoinForward,
    JoinGradients,
    JoinResult,
    MaxPoolBackward,
    MaxPoolForward,
    MaxPoolResult,
    NormaliseBackward,
    NormaliseForward,
    OutputGradient,
    OutputGradientResult,
    SqueezeBackward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
    StatisticsResult,
    SweepGradients,
)
from bnrestructure.kernels.cpu import memory
from bnrestructure.kernels.cpu.elements import ELEMENT_CODES, activation_code
from bnrestructure.kernels.cpu.library import declare
from bnrestructure.kernels.cpu.memory import Keep
from bnrestructure.kernels.cpu.structures import SweepArguments
from bnrestructure.kernels.layout import pitch_of
from bnrestructure.kernels.rounding import narrowed

__all__ = ["RUN", "unsupported"]

_byref = ctypes.byref
_statistics_forward = declare("bnr_statistics_forward")
_statistics_backward = declare("bnr_statistics_backward")
_normalise_forward = declare("bnr_normalise_forward")
_normalise_backward = declare("bnr_normalise_backward")
_squeeze_forward = declare("bnr_squeeze_forward")
_squeeze_backward = declare("bnr_squeeze_backward")
_join_forward = declare("bnr_join_forward")
_join_backward = declare("bnr_join_backward")
_max_pool_forward = declare("bnr_max_pool_forward")
_max_pool_backward = declare("bnr_max_pool_backward")
_output_gradient = declare("bnr_output_gradient")


def _sweep(shape: torch.Size, dtype: torch.dtype) -> SweepArguments:
    """The arguments of a sweep over tensors of this shape and dtype, without any of them."""
    code = ELEMENT_CODES.get(dtype)
    if code is None or len(shape) != 4 or 0 in shape:
        raise UnsupportedCallError(_unsupported_tensor(shape, dtype))
    a = SweepArguments()
    a.element = code
    a.images, a.channels, a.height, a.width = shape
    a.threads = torch.get_num_threads()
    a.gradient_factor = 1.0
    return a


def _of_x(x: Tensor, transform: Transform, dtype: torch.dtype, keep: Keep, gated: bool = False) -> SweepArguments:
    """The arguments of a sweep over transform(x), computed in ``dtype``."""
    if transform.gate is not None and not gated:
        raise UnsupportedCallError(_GATE)
    if x.dtype is not dtype and (reason := narrowed(x, transform, dtype)) is not None:
        raise UnsupportedCallError(reason)
    a = _sweep(x.shape, dtype)
    a.x, a.x_pitch = memory.pixels(x, x.shape, dtype, keep)
    a.mean, a.scale, a.beta = memory.vectors(keep, a.channels, transform.mean, transform.scale, transform.beta)
    if transform.gate is not None:
        a.gate = memory.vector(transform.gate, keep, *x.shape[:2])
    a.activation, a.slope = activation_code(transform.act)
    return a


def _to_dx(a: SweepArguments, x: Tensor, accumulate: Tensor | None) -> Tensor:
    """Where the sweep writes the gradient of x: ``accumulate`` if it can be added to in place, else fresh memory."""
    if accumulate is None or accumulate.dtype is not x.dtype or not pitch_of(accumulate):
        dx, a.dx, a.dx_pitch = memory.fresh(x.shape, x.dtype)
        return dx
    a.dx, a.dx_pitch = memory.written(accumulate, x.shape, x.dtype)
    a.accumulate = 1
    return accumulate


def _sums(a: SweepArguments, affine: bool) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Memory for SP and SPX, which only a transform with a mean has."""
    if not affine:
        return None, None
    sum_p, a.sum_p = memory.fresh_vector(a.channels)
    sum_px, a.sum_px = memory.fresh_vector(a.channels)
    return sum_p, sum_px


def _delivered(dx: Tensor, accumulate: Tensor | None) -> Tensor:
    """``dx``, added to ``accumulate`` where the kernel could not write there itself."""
    return dx if accumulate is None or dx is accumulate else accumulate.add_(dx)


def statistics_forward(call: StatisticsForward) -> StatisticsResult:
    x, keep = call.x if call.out is None else call.out.copy_(call.x), Keep()
    a = _sweep(x.shape, x.dtype)
    a.x, a.x_pitch = memory.pixels(x, x.shape, x.dtype, keep)
    mean, a.z_mean = memory.fresh_vector(a.channels)
    var, a.z_var = memory.fresh_vector(a.channels)
    _statistics_forward.call(_byref(a))
    return StatisticsResult(mean, var)


def statistics_backward(call: StatisticsBackward) -> Tensor:
    x, factors, keep = call.x, call.factors, Keep()
    a = _sweep(x.shape, x.dtype)
    a.x, a.x_pitch = memory.pixels(x, x.shape, x.dtype, keep)
    a.z_mean, a.a, a.b = memory.vectors(keep, a.channels, call.mean, *factors)
    dx = _to_dx(a, x, call.accumulate)
    _statistics_backward.call(_byref(a))
    return _delivered(dx, call.accumulate)


def normalise_forward(call: NormaliseForward) -> Tensor:
    x, out, keep = call.x, call.out, Keep()
    a = _of_x(x, call.transform, call.dtype, keep, gated=True)
    if call.r is not None:
        a.r, a.r_pitch = memory.pixels(call.r, x.shape, call.dtype, keep)
    if out is not None and out.dtype is call.dtype and pitch_of(out):
        z = out
        a.z, a.z_pitch = memory.written(out, x.shape, call.dtype)
    else:
        z, a.z, a.z_pitch = memory.fresh_kept(x.shape, call.dtype)
    _normalise_forward.call(_byref(a))
    return z if out is None or z is out else out.copy_(z)


def normalise_backward(call: NormaliseBackward) -> SweepGradients:
    x, gate, keep = call.x, call.transform.gate, Keep()
    a = _of_x(x, call.transform, x.dtype, keep, gated=True)
    a.dz, a.dz_pitch = memory.pixels(call.dz, x.shape, x.dtype, keep)
    a.gradient_factor = call.factor
    dx = _to_dx(a, x, call.accumulate)
    sum_p, sum_px = _sums(a, call.transform.gives_sums)
    dgate = None
    if call.factors is not None:
        a.gate = memory.vector(call.factors, keep, *x.shape[:2])
    elif gate is not None:
        dgate, a.gate_gradient = memory.fresh_vector(*gate.shape)
    _normalise_backward.call(_byref(a))
    return SweepGradients(_delivered(dx, call.accumulate), sum_p, sum_px, None if dgate is None or gate is None else dgate.to(gate.dtype))


def squeeze_forward(call: SqueezeForward) -> Tensor:
    x, keep = call.x, Keep()
    a = _of_x(x, call.transform, call.dtype, keep)
    pooled, a.pooled = memory.fresh_vector(*x.shape[:2])
    _squeeze_forward.call(_byref(a))
    return pooled.to(call.dtype)


def squeeze_backward(call: SqueezeBackward) -> SweepGradients:
    x, dz, accumulate, keep = call.x, call.dz, call.accumulate, Keep()
    a = _of_x(x, call.transform, x.dtype, keep)
    a.pooled = memory.vector(call.dpooled, keep, *x.shape[:2])
    if dz is not None:
        a.dz, a.dz_pitch = memory.pixels(dz, x.shape, x.dtype, keep)
    dx = _to_dx(a, x, accumulate)
    overwrites = accumulate is not None and accumulate is dz
    if overwrites:
        a.accumulate = 0
    sum_p, sum_px = _sums(a, call.transform.mean is not None)
    _squeeze_backward.call(_byref(a))
    if overwrites and accumulate is not None and dx is not accumulate:
        dx = accumulate.copy_(dx)
    return SweepGradients(_delivered(dx, accumulate), sum_p, sum_px)


def join_forward(call: JoinForward) -> JoinResult:
    join, keep = call.join, Keep()
    y = join.y
    a = _with_join(call.join, call.dtype, keep)
    if call.out is None:
        z, a.z, a.z_pitch = memory.fresh_kept(y.shape, call.dtype)
    else:
        z = call.out
        a.z, a.z_pitch = memory.written(z, y.shape, call.dtype)
    mean = var = None
    if call.statistics:
        mean, a.z_mean = memory.fresh_vector(a.channels)
        var, a.z_var = memory.fresh_vector(a.channels)
    _join_forward.call(_byref(a))
    return JoinResult(z, mean, var)


def join_backward(call: JoinBackward) -> JoinGradients:
    join, z, accumulate, keep = call.join, call.z, call.accumulate, Keep()
    y = join.y
    dtype = y.dtype if z is None else z.dtype
    a = _with_join(join, dtype, keep)
    a.dz, a.dz_pitch = memory.pixels(call.dz, y.shape, dtype, keep)
    a.gradient_factor = call.factor
    if call.statistics is not None:
        if z is None:
            raise UnsupportedCallError("a join's statistics without its sum")
        a.a, a.b, a.z_mean = memory.vectors(keep, a.channels, *call.statistics)
        a.z, a.z_pitch = memory.pixels(z, y.shape, dtype, keep)
    if accumulate is not None and (accumulate.dtype is not dtype or not pitch_of(accumulate)):  # the mask comes after the sum
        accumulate = memory.channels_last(accumulate, dtype)
    if accumulate is None:
        g, a.dx, a.dx_pitch = memory.fresh(y.shape, dtype)
    else:
        g, a.accumulate = accumulate, 1
        a.dx, a.dx_pitch = memory.written(g, y.shape, dtype)
    sum_p, a.sum_p = memory.fresh_vector(a.channels)
    sum_py, a.sum_px = memory.fresh_vector(a.channels)
    sum_pr, a.sum_pr = memory.fresh_vector(a.channels)
    _join_backward.call(_byref(a))
    return JoinGradients(g, sum_p, sum_py if join.ty.gives_sums else None, None if join.tr.mean is None else sum_pr)


def _with_join(join: Any, dtype: torch.dtype, keep: Keep) -> SweepArguments:
    """The arguments of a join's sweep: its operands, their vectors and its activation."""
    y = join.y
    if join.r.dtype is not y.dtype or y.dtype is not dtype:
        raise UnsupportedCallError("the tensors of one sweep must have one dtype")
    a = _sweep(y.shape, dtype)
    j = memory.join(join, y.shape, dtype, keep)
    a.x, a.x_pitch, a.mean, a.scale, a.beta, a.gate = j.y, j.y_pitch, j.y_mean, j.y_scale, j.y_beta, j.gate
    a.r, a.r_pitch, a.r_mean, a.r_scale, a.r_beta = j.r, j.r_pitch, j.r_mean, j.r_scale, j.r_beta
    a.activation, a.slope = j.activation, j.slope
    return a


def max_pool_forward(call: MaxPoolForward) -> MaxPoolResult:
    x, keep = call.x, Keep()
    a = _of_x(x, call.transform, call.dtype, keep)
    shape = _with_window(a, x, call.geometry)
    y, a.z, a.z_pitch = memory.fresh_kept(shape, call.dtype)
    index, a.index, a.index_pitch = memory.fresh_kept(shape, torch.uint8)
    _max_pool_forward.call(_byref(a))
    return MaxPoolResult(y, index)


def max_pool_backward(call: MaxPoolBackward) -> SweepGradients:
    x, index, keep = call.x, call.index, Keep()
    a = _of_x(x, call.transform, x.dtype, keep)
    shape = _with_window(a, x, call.geometry)
    a.dz, a.dz_pitch = memory.pixels(call.dy, shape, x.dtype, keep)
    a.index, a.index_pitch = memory.pixels(index, shape, torch.uint8, keep)
    dx = _to_dx(a, x, call.accumulate)
    sum_p, sum_px = _sums(a, call.transform.mean is not None)
    _max_pool_backward.call(_byref(a))
    return SweepGradients(_delivered(dx, call.accumulate), sum_p, sum_px)


def _with_window(a: SweepArguments, x: Tensor, geometry: PoolGeometry) -> tuple[int, ...]:
    """The shape of the pool's result, which ``a`` is told together with the window."""
    if (reason := _unusable_window(x.shape, geometry)) is not None:
        raise UnsupportedCallError(reason)
    size = geometry.output_size(x.shape[2:])
    a.kernel_h, a.kernel_w = geometry.kernel
    a.stride_h, a.stride_w = geometry.stride
    a.padding_h, a.padding_w = geometry.padding
    a.out_height, a.out_width = size
    return (*x.shape[:2], *size)


def output_gradient(call: OutputGradient) -> OutputGradientResult:
    dy, edge, keep = call.dy, call.edge, Keep()
    a = _sweep(dy.shape, call.dtype)
    a.dz, a.dz_pitch = memory.pixels(dy, dy.shape, call.dtype, keep)
    a.gradient_factor = call.factor
    c = a.channels
    a.s = memory.vector(edge.s, keep, c)
    if edge.a is not None and edge.y is not None:
        factors = edge.factors  # alive until the kernel has run
        a.a, a.b, a.z_mean = memory.vectors(keep, c, *factors, edge.mean)
        a.z, a.z_pitch = memory.pixels(edge.y, dy.shape, call.dtype, keep)
    d, a.dx, a.dx_pitch = memory.fresh(dy.shape, call.dtype)
    bias = None
    if call.bias:
        bias, a.sum_p = memory.fresh_vector(c)
    _output_gradient.call(_byref(a))
    return OutputGradientResult(d, bias)


#: What answers each call.
RUN: dict[type[Call[Any]], Any] = {
    StatisticsForward: statistics_forward,
    StatisticsBackward: statistics_backward,
    NormaliseForward: normalise_forward,
    NormaliseBackward: normalise_backward,
    SqueezeForward: squeeze_forward,
    SqueezeBackward: squeeze_backward,
    JoinForward: join_forward,
    JoinBackward: join_backward,
    MaxPoolForward: max_pool_forward,
    MaxPoolBackward: max_pool_backward,
    OutputGradient: output_gradient,
}

_GATE = "a gate is applied by convolutions, the normalise and to the first operand of a join alone"


def unsupported(call: Call[Any]) -> str | None:
    """Why a sweep cannot answer this call, in one line, or None. Memory is not asked for: the tensors may be on the meta device."""
    x: Tensor = call.operand
    dtype = getattr(call, "dtype", x.dtype)
    if (reason := _unsupported_tensor(x.shape, x.dtype)) is not None:
        return reason
    if isinstance(call, JoinForward | JoinBackward):
        join = call.join
        if join.r.dtype != x.dtype or dtype != x.dtype:
            return "the tensors of one sweep must have one dtype"
        return _GATE if join.tr.gate is not None else unsupported_activation(join.act)
    transform = getattr(call, "transform", None)
    if transform is not None:
        if transform.gate is not None and not isinstance(call, NormaliseForward | NormaliseBackward):
            return _GATE
        if reason := unsupported_activation(transform.act) or narrowed(x, transform, dtype):
            return reason
    if dtype not in ELEMENT_CODES:
        return f"the CPU kernels are for fp32 and bf16, not {dtype}"
    return _unusable_window(x.shape, call.geometry) if isinstance(call, MaxPoolForward | MaxPoolBackward) else None


def _unsupported_tensor(shape: torch.Size, dtype: torch.dtype) -> str | None:
    if len(shape) != 4:
        return f"the CPU kernels are for 4-D tensors, this one has {len(shape)} dimensions"
    if dtype not in ELEMENT_CODES:
        return f"the CPU kernels are for fp32 and bf16, not {dtype}"
    return "the tensor is empty" if 0 in shape else None


def _unusable_window(x: torch.Size, geometry: PoolGeometry) -> str | None:
    """Why the pooling kernels cannot take this window, or None."""
    if geometry.kernel[0] * geometry.kernel[1] > 255:
        return "a pooling window has at most 255 positions"
    fits = all(0 <= 2 * p <= k for p, k in zip(geometry.padding, geometry.kernel, strict=True))
    if min(*geometry.kernel, *geometry.stride) < 1 or not fits or min(geometry.output_size(x[2:])) < 1:
        return "a pooling window that PyTorch refuses"
    return None
