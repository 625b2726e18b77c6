"""What the CUDA kernels can run, decided from a call's actual arguments. Needs neither a GPU nor Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import util
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.activation import unsupported_activation
from bnrestructure.core.edges import BackwardEdge, Join, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import (
    Call,
    ConvBackward,
    ConvForward,
    FinalizeBackward,
    FinalizeForward,
    JoinBackward,
    JoinForward,
    MaxPoolBackward,
    MaxPoolForward,
    NormaliseBackward,
    NormaliseForward,
    OutputGradient,
    SqueezeBackward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.cuda.tiles import READ_BY_ONE
from bnrestructure.kernels.operands import leaves_of, require_fit
from bnrestructure.kernels.unmerged import Unmerged

__all__ = ["ELEMENT_TYPES", "supports", "unavailable_reason"]

#: What activations, weights and parameters may be made of.
ELEMENT_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_OLDEST = (8, 0)
_MOST_ROWS = 2**31 - 2**16


@cache
def unavailable_reason() -> str | None:
    """Why no CUDA kernel can run in this installation, in one line, or None if they can."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm: the kernels are for NVIDIA devices"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        return f"the device has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    return None


def supports(call: Call[Any]) -> str | None:
    """Why the kernels cannot answer this call, in one line, or None if they can.

    Activations are 4-D, fp32, bf16 or fp16, with elements, of any strides: what is not channels_last (or a channel
    slice of that) is copied to it first. Neither memory nor the device is touched here.
    """
    if any(isinstance(leaf, Tensor) and leaf.is_neg() for leaf in leaves_of(call)):
        return "a view with the negative bit, whose numbers have the other sign in memory"
    return _RULES[type(call)](call)


def _activation_tensor(what: str, x: Tensor) -> str | None:
    if x.dim() != 4:
        return f"the CUDA kernels are for 4-D tensors, {what} has {x.dim()} dimensions"
    if x.dtype not in ELEMENT_TYPES:
        return f"the CUDA kernels are for fp32, bf16 and fp16, {what} is {x.dtype}"
    if x.numel() == 0:
        return f"{what} is empty"
    if x.numel() // x.shape[1] > _MOST_ROWS:
        return f"{what} has more than 2^31 pixels"
    return None


def _fits(x: Tensor, *others: Tensor | None, shape: Sequence[int] | None = None) -> str | None:
    """Why these are not all of x's shape (or of ``shape``), or None."""
    wanted = x.shape if shape is None else shape
    for t in others:
        if t is not None and t.shape != wanted:
            return f"a tensor of shape {list(t.shape)} where {list(wanted)} was expected"
    return None


def _transform(x: Tensor, *transforms: Transform) -> str | None:
    try:
        require_fit(x, *transforms)
    except UnsupportedCallError as error:
        return str(error)
    return None


def _conv_forward(call: ConvForward) -> str | None:
    joined = None if call.join is None else _join(call.join, call.dtype) or _fits(call.x, call.join.y)
    return joined or _convolution(call) or (None if call.out is None else _fits(call.x, call.out, shape=_result(call)))


def _conv_backward(call: ConvBackward) -> str | None:
    gate = None
    if call.transform.gate is not None and any(s != 1 for s in call.geometry.stride) and call.weight.shape[1] != 1:
        gate = "a gate before a dense convolution with a stride"
    joined = None if call.join is None else _join(call.join, call.dtype) or _fits(call.x, call.join.y)
    reason = _activation_tensor("the gradient", call.dy) or gate or joined or _convolution(call)
    reason = reason or _fits(call.dy, call.dy, call.edge.y, shape=_result(call)) or _fits(call.x, call.accumulate)
    return reason or _edge(call.edge, call.dy)


def _edge(edge: BackwardEdge, dy: Tensor) -> str | None:
    return next((r for v in (edge.s, edge.a, edge.b, edge.mean) if v is not None and (r := _fits(v, v, shape=dy.shape[1:2]))), None)


def _result(call: ConvForward | ConvBackward) -> tuple[int, ...]:
    size = call.geometry.output_size(call.x.shape[2:], call.weight.shape[2:])
    return call.x.shape[0], call.weight.shape[0], *size


def _convolution(call: ConvForward | ConvBackward) -> str | None:
    x, weight, geometry = call.x, call.weight, call.geometry
    for what, found in (("compute dtype", call.dtype), ("the weight", weight.dtype)):
        if found not in ELEMENT_TYPES:
            return f"the CUDA kernels are for fp32, bf16 and fp16, {what} is {found}"
    if call.cast is not None and (call.cast.shape != weight.shape or call.cast.dtype != call.dtype):
        return f"a cast weight {list(call.cast.shape)} of {call.cast.dtype} for one {list(weight.shape)} in {call.dtype}"
    if weight.numel() == 0:
        return "the weight is empty"
    if geometry.groups > 65535 and weight.shape[1] != 1:
        return "more than 65535 groups"
    reason = _activation_tensor("the input", x) or geometry.misfit(x.shape, weight.shape)
    return reason or _transform(x, call.transform) or unsupported_activation(call.transform.act)


def _join(join: Join, dtype: torch.dtype) -> str | None:
    y, r = join.y, join.r
    reason = _activation_tensor("an operand", y) or _activation_tensor("an operand", r) or _fits(y, r)
    if reason is None and {y.dtype, r.dtype} != {dtype}:
        reason = "the tensors of one sweep must have one dtype"
    return reason or _transform(y, join.ty, join.tr) or unsupported_activation(join.act)


def _join_forward(call: JoinForward) -> str | None:
    return _join(call.join, call.dtype)


def _join_backward(call: JoinBackward) -> str | None:
    dtype = call.join.y.dtype if call.z is None else call.z.dtype
    return _join(call.join, dtype) or _activation_tensor("the gradient", call.dz) or _fits(call.join.y, call.dz, call.z, call.accumulate)


def _normalise_forward(call: NormaliseForward) -> str | None:
    dtype = call.dtype if call.out is None else call.out.dtype
    wrong = None if dtype in ELEMENT_TYPES else f"the result would be {dtype}"
    added = None if call.r is None else _activation_tensor("what is added", call.r)
    return _activation_tensor("the input", call.x) or wrong or added or _of_x(call) or _fits(call.x, call.out, call.r)


def _normalise_backward(call: NormaliseBackward) -> str | None:
    reason = _activation_tensor("the gradient", call.dz) or _activation_tensor("the input", call.x) or _of_x(call)
    return reason or _fits(call.x, call.dz, call.accumulate) or _fits(call.x, call.factors, shape=call.x.shape[:2])


def _of_x(call: NormaliseForward | NormaliseBackward | SqueezeForward | SqueezeBackward | MaxPoolForward | MaxPoolBackward) -> str | None:
    return _transform(call.x, call.transform) or unsupported_activation(call.transform.act)


def _statistics_forward(call: StatisticsForward) -> str | None:
    other = None if call.out is None or call.out.dtype == call.x.dtype else f"a copy of {call.x.dtype} in {call.out.dtype}"
    return _activation_tensor("the input", call.x) or other or _fits(call.x, call.out)


def _statistics_backward(call: StatisticsBackward) -> str | None:
    reason = _activation_tensor("the input", call.x) or _fits(call.x, call.accumulate)
    return reason or _transform(call.x, Transform(call.mean, call.a, call.b))


def _output_gradient(call: OutputGradient) -> str | None:
    return _activation_tensor("the gradient", call.dy) or _fits(call.dy, call.edge.y) or _edge(call.edge, call.dy)


def _finalize_forward(call: FinalizeForward) -> str | None:
    running = call.running_mean, call.running_var
    if any(r is not None and not r.is_contiguous() for r in running):
        return "running statistics must be contiguous to be updated in place"
    behind, channels, last = None, call.mean.numel(), call.behind or (call.mean, call.var)
    if call.behind is not None:
        behind, channels = _vector(call.behind[0]) or _fits(*call.behind), channels + call.behind[0].numel()
    tiles = None if call.unmerged is None else _tiles(call.unmerged, *last)
    reason = _vector(call.mean) or _fits(call.mean, call.var) or behind or tiles
    return reason or _parameters(channels, call.weight, call.bias, *running)


def _tiles(found: Unmerged, mean: Tensor, var: Tensor) -> str | None:
    partial, _, _, counts = found
    if any(v is not None and (v.dtype is not torch.float32 or not v.is_contiguous()) for v in (*found, mean, var) if isinstance(v, Tensor)):
        return "statistics of tiles that are not contiguous fp32"
    if partial.dim() != 3 or partial.shape[1] > READ_BY_ONE:
        return f"statistics of tiles {list(partial.shape)} where [3, at most {READ_BY_ONE}, channels] were expected"
    return _fits(partial, partial, shape=(3, partial.shape[1], mean.numel())) or _fits(partial, counts, shape=partial.shape[1:2])


def _finalize_backward(call: FinalizeBackward) -> str | None:
    return _vector(call.rstd) or _fits(call.rstd, call.dscale, call.dbeta, call.scale, call.dmean, call.dvar)


def _vector(of: Tensor) -> str | None:
    if of.dtype is not torch.float32 or of.dim() != 1 or of.numel() == 0:
        return f"batch statistics must be fp32 vectors with elements, not {of.dtype} {list(of.shape)}"
    return None


def _parameters(channels: int, *parameters: Tensor | None) -> str | None:
    for parameter in parameters:
        if parameter is not None and parameter.dtype not in ELEMENT_TYPES:
            return f"a batch norm's {parameter.dtype} parameters are none of fp32, bf16 and fp16"
        if parameter is not None and parameter.numel() != channels:
            return f"a parameter of {parameter.numel()} numbers for {channels} channels"
    return None


def _squeeze_forward(call: SqueezeForward) -> str | None:
    wrong = None if call.dtype in ELEMENT_TYPES else f"the result would be {call.dtype}"
    gate = None if call.transform.gate is None else "a gate is applied by convolutions and by the normalise alone"
    return _activation_tensor("the input", call.x) or wrong or gate or _of_x(call)


def _squeeze_backward(call: SqueezeBackward) -> str | None:
    if call.dpooled.dtype not in ELEMENT_TYPES:
        return f"the gradient of the average is {call.dpooled.dtype}"
    gradient = None if call.dz is None else _activation_tensor("the gradient", call.dz)
    reason = gradient or _activation_tensor("the input", call.x) or _of_x(call) or _fits(call.x, call.dz, call.accumulate)
    return reason or _fits(call.x, call.dpooled, shape=call.x.shape[:2])


def _max_pool_forward(call: MaxPoolForward) -> str | None:
    wrong = None if call.dtype in ELEMENT_TYPES else f"the result would be {call.dtype}"
    return _window(call) or wrong


def _max_pool_backward(call: MaxPoolBackward) -> str | None:
    reason = _activation_tensor("the gradient", call.dy) or _window(call)
    return reason or _fits(call.x, call.dy, call.index, shape=(*call.x.shape[:2], *call.geometry.output_size(call.x.shape[2:])))


def _window(call: MaxPoolForward | MaxPoolBackward) -> str | None:
    geometry = call.geometry
    if len(geometry.kernel) != 2 or geometry.kernel[0] * geometry.kernel[1] > 255:
        return "a pooling window of more than 255 positions, or not 2-D"
    if any(2 * p > k for p, k in zip(geometry.padding, geometry.kernel, strict=True)):
        return "padding of more than half the window, which PyTorch refuses"
    gate = None if call.transform.gate is None else "a gate before a max pool"
    return _activation_tensor("the input", call.x) or gate or _of_x(call)


_RULES: dict[type[Call[Any]], Callable[[Any], str | None]] = {
    ConvForward: _conv_forward,
    ConvBackward: _conv_backward,
    OutputGradient: _output_gradient,
    NormaliseForward: _normalise_forward,
    NormaliseBackward: _normalise_backward,
    JoinForward: _join_forward,
    JoinBackward: _join_backward,
    StatisticsForward: _statistics_forward,
    StatisticsBackward: _statistics_backward,
    FinalizeForward: _finalize_forward,
    FinalizeBackward: _finalize_backward,
    MaxPoolForward: _max_pool_forward,
    MaxPoolBackward: _max_pool_backward,
    SqueezeForward: _squeeze_forward,
    SqueezeBackward: _squeeze_backward,
}
