"""The per-channel step between the two halves of a batch norm: one C call instead of a dozen tiny tensor ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnrestructure.kernels.cpu.layout import ELEMENT_CODES
from bnrestructure.kernels.cpu.library import declare
from bnrestructure.kernels.cpu.memory import of_parameter, of_vector
from bnrestructure.kernels.layout import vector
from bnrestructure.kernels.operands import readable

__all__ = ["finalize_backward", "finalize_forward", "supports"]

_finalize_forward = declare("bnr_finalize_forward", "pp i d pi pi pi pi dd ppp")
_finalize_backward = declare("bnr_finalize_backward", "pp i pi pp")


def finalize_forward(
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rstd, scale, beta), each [C] fp32; updates the running statistics in place. See kernels/reference."""
    mean, var = vector(mean), vector(var)
    channels = mean.shape[0]
    rstd, scale, beta = torch.empty(3, channels).unbind()
    weight, bias = _contiguous(weight), _contiguous(bias)
    values = float(count)
    _finalize_forward(
        of_vector(mean, channels), of_vector(var, channels), channels, values / (values - 1) if values > 1 else math.inf,
        *_coded(weight, channels), *_coded(bias, channels), *_coded(running_mean, channels), *_coded(running_var, channels),
        float(momentum), eps, rstd.data_ptr(), scale.data_ptr(), beta.data_ptr(),
    )  # fmt: skip
    return rstd, scale, beta


def finalize_backward(dscale: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dvar, dweight), each [C] fp32, from the gradient of scale."""
    dscale, rstd, weight = vector(dscale), vector(rstd), _contiguous(weight)
    channels = rstd.shape[0]
    dvar, dweight = torch.empty(2, channels).unbind()
    _finalize_backward(
        of_vector(dscale, channels), of_vector(rstd, channels), channels, *_coded(weight, channels), dvar.data_ptr(), dweight.data_ptr()
    )
    return dvar, dweight


def supports(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why these arguments need the reference, in one line, or None.

    Batch statistics must be fp32, parameters and running statistics fp32 or bf16.
    """
    if args[0].dtype is not torch.float32 or args[0].dim() != 1:
        return f"batch statistics must be fp32 vectors, not {args[0].dtype}"
    if name == "finalize_forward" and (args[1].shape != args[0].shape or args[1].dtype is not torch.float32):
        return "a mean and a variance that differ in size or dtype"
    if name == "finalize_backward" and args[1].shape != args[0].shape:
        return "a gradient of another size"
    parameters = args[3:7] if name == "finalize_forward" else args[2:3]
    for parameter in parameters:
        if parameter is not None and parameter.dtype not in ELEMENT_CODES:
            return f"a batch norm's {parameter.dtype} parameters are neither fp32 nor bf16"
    if name == "finalize_forward" and any(r is not None and not r.is_contiguous() for r in args[5:7]):
        return "running statistics must be contiguous to be updated in place"
    return None


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else readable(parameter).contiguous()


def _coded(parameter: Tensor | None, channels: int) -> tuple[int, int]:
    """(address, element code), as the kernels take a parameter or running statistic of either dtype."""
    return (0, 0) if parameter is None else (of_parameter(parameter, channels), ELEMENT_CODES[parameter.dtype])
