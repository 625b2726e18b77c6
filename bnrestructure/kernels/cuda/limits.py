"""What the CUDA kernels can run, decided from a call's actual arguments. Needs neither a GPU nor Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import util
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.activation import unsupported_activation
from bnrestructure.kernels import join

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


def supports(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why kernel ``name`` cannot run with these arguments (those of kernels/reference), in one line, or None if it can.

    Activations are 4-D, fp32, bf16 or fp16, with elements, of any strides: what is not channels_last (or a channel
    slice of that) is copied to it first. Neither memory nor the device is touched here.
    """
    return _RULES[name](args, kwargs)


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


def _first(*reasons: str | None) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _conv_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    x, transform, weight, _, geometry = args
    return _convolution(x, transform, weight, geometry, kwargs["dtype"])


def _conv_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    dy, _, x, transform, weight, geometry = args
    gate = None
    if transform.gate is not None and any(s != 1 for s in geometry.stride) and weight.shape[1] != 1:
        gate = "a gate before a dense convolution with a stride"
    return _first(
        _activation_tensor("the gradient", dy), gate, _convolution(x, transform, weight, geometry, kwargs["dtype"])
    )


def _convolution(x: Tensor, transform: Any, weight: Tensor, geometry: Any, dtype: torch.dtype) -> str | None:
    for what, found in (("compute dtype", dtype), ("the weight", weight.dtype)):
        if found not in ELEMENT_TYPES:
            return f"the CUDA kernels are for fp32, bf16 and fp16, {what} is {found}"
    if weight.numel() == 0:
        return "the weight is empty"
    if geometry.groups > 65535 and weight.shape[1] != 1:
        return "more than 65535 groups"
    return _first(_activation_tensor("the input", x), unsupported_activation(transform.act))


def _normalise_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    x, transform = args
    dtype = kwargs["dtype"] if kwargs.get("out") is None else kwargs["out"].dtype
    wrong = None if dtype in ELEMENT_TYPES else f"the result would be {dtype}"
    return _first(_activation_tensor("the input", x), wrong, unsupported_activation(transform.act))


def _normalise_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    dz, x, transform = args
    return _first(
        _activation_tensor("the gradient", dz),
        _activation_tensor("the input", x),
        unsupported_activation(transform.act),
    )


def _residual(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    act = next(a for a in args if isinstance(a, str))
    named = [a for a in args if isinstance(a, Tensor)]
    reasons = (_activation_tensor("an operand", x) for x in named)
    return _first(*reasons, unsupported_activation(act))


def _statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    return _activation_tensor("the input", args[0])


def _finalize(parameters: slice) -> Callable[[tuple[Any, ...], dict[str, Any]], str | None]:
    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if args[0].dtype is not torch.float32 or args[0].dim() != 1 or args[0].numel() == 0:
            return f"batch statistics must be fp32 vectors with elements, not {args[0].dtype} {list(args[0].shape)}"
        for parameter in args[parameters]:
            if parameter is not None and parameter.dtype not in ELEMENT_TYPES:
                return f"a batch norm's {parameter.dtype} parameters are none of fp32, bf16 and fp16"
        if len(args) > 5 and any(r is not None and not r.is_contiguous() for r in args[5:7]):
            return "running statistics must be contiguous to be updated in place"
        if len(args) > 7 and isinstance(args[7], Tensor):
            return "the momentum is a tensor"
        return None

    return rule


def _squeeze_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    x, transform = args
    wrong = None if kwargs["dtype"] in ELEMENT_TYPES else f"the result would be {kwargs['dtype']}"
    return _first(_activation_tensor("the input", x), wrong, unsupported_activation(transform.act))


def _squeeze_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    dpooled, dz, x, transform = args
    if dpooled.dtype not in ELEMENT_TYPES:
        return f"the gradient of the average is {dpooled.dtype}"
    gradient = None if dz is None else _activation_tensor("the gradient", dz)
    return _first(gradient, _activation_tensor("the input", x), unsupported_activation(transform.act))


def _max_pool_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    x, transform, geometry = args
    if len(geometry.kernel) != 2 or geometry.kernel[0] * geometry.kernel[1] > 255:
        return "a pooling window of more than 255 positions, or not 2-D"
    if any(2 * p > k for p, k in zip(geometry.padding, geometry.kernel, strict=True)):
        return "padding of more than half the window, which PyTorch refuses"
    wrong = None if kwargs["dtype"] in ELEMENT_TYPES else f"the result would be {kwargs['dtype']}"
    gate = None if transform.gate is None else "a gate before a max pool"
    return _first(_activation_tensor("the input", x), wrong, gate, unsupported_activation(transform.act))


def _max_pool_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    dy, _, x, transform, _ = args
    return _first(
        _activation_tensor("the gradient", dy),
        _activation_tensor("the input", x),
        unsupported_activation(transform.act),
    )


_RULES: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], str | None]] = {
    "conv_forward": _conv_forward,
    "conv_backward": _conv_backward,
    "normalise_forward": _normalise_forward,
    "normalise_backward": _normalise_backward,
    "join_forward": partial(join.unsupported_part, supports, "join_forward"),
    "join_backward": partial(join.unsupported_part, supports, "join_backward"),
    "residual_forward": _residual,
    "residual_backward": _residual,
    "statistics_forward": _statistics,
    "statistics_backward": _statistics,
    "finalize_forward": _finalize(slice(3, 7)),
    "finalize_backward": _finalize(slice(2, 3)),
    "max_pool_forward": _max_pool_forward,
    "max_pool_backward": _max_pool_backward,
    "squeeze_forward": _squeeze_forward,
    "squeeze_backward": _squeeze_backward,
}
