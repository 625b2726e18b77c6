"""The per-channel step between the two halves of a batch norm: one C call instead of a dozen tiny tensor operations."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import Call, FinalizeBackward, FinalizeForward, FinalizeGradients, FinalizeResult
from bnrestructure.kernels.cpu import memory
from bnrestructure.kernels.cpu.elements import ELEMENT_CODES
from bnrestructure.kernels.cpu.library import declare
from bnrestructure.kernels.cpu.memory import Keep
from bnrestructure.kernels.cpu.structures import FinalizeArguments
from bnrestructure.kernels.momentum import counted
from bnrestructure.kernels.operands import readable

__all__ = ["RUN", "unsupported"]

_forward = declare("bnr_finalize_forward")
_backward = declare("bnr_finalize_backward")


def finalize_forward(call: FinalizeForward) -> FinalizeResult:
    mean, var, keep = call.mean, call.var, Keep()
    if mean.dim() != 1 or call.unmerged is not None or any(v.dtype is not torch.float32 for v in (mean, var, *(call.behind or ()))):
        raise UnsupportedCallError(str(unsupported(call)))
    if call.behind is not None:
        mean, var = (torch.cat((readable(v), readable(behind))) for v, behind in zip((mean, var), call.behind, strict=True))
    a = FinalizeArguments()
    a.channels = channels = mean.shape[0]
    a.mean, a.var = memory.vectors(keep, channels, mean, var)
    count = float(call.count)
    a.unbias = count / (count - 1) if count > 1 else math.inf
    a.eps = call.eps
    a.weight, a.weight_element = memory.parameter(call.weight, channels, keep)
    a.bias, a.bias_element = memory.parameter(call.bias, channels, keep)
    a.running_mean, a.running_mean_element = memory.parameter(call.running_mean, channels, None)
    a.running_var, a.running_var_element = memory.parameter(call.running_var, channels, None)
    rstd, a.rstd = memory.fresh_vector(channels)
    scale, a.scale = memory.fresh_vector(channels)
    beta, a.beta = memory.fresh_vector(channels)
    a.momentum = counted(call.batches, call.momentum)  # last: where the call is refused above, another kernel counts
    _forward.call(ctypes.byref(a))
    return FinalizeResult(rstd, scale, beta, mean, var)


def finalize_backward(call: FinalizeBackward) -> FinalizeGradients:
    rstd, keep = call.rstd, Keep()
    if rstd.dtype is not torch.float32 or rstd.dim() != 1:
        raise UnsupportedCallError(f"batch statistics must be fp32 vectors, not {rstd.dtype}")
    a = FinalizeArguments()
    a.channels = channels = rstd.shape[0]
    a.dscale, a.dbeta, a.rstd, a.scale = memory.vectors(keep, channels, call.dscale, call.dbeta, rstd, call.scale)
    if call.dmean is not None:
        (a.of_mean,) = memory.vectors(keep, channels, call.dmean)
    if call.dvar is not None:
        (a.of_var,) = memory.vectors(keep, channels, call.dvar)
    dmean, a.dmean = memory.fresh_vector(channels)
    dvar, a.dvar = memory.fresh_vector(channels)
    dweight, a.dweight = memory.fresh_vector(channels)
    _backward.call(ctypes.byref(a))
    return FinalizeGradients(dmean, dvar, dweight)


#: What answers each call.
RUN: dict[type[Call[Any]], Any] = {FinalizeForward: finalize_forward, FinalizeBackward: finalize_backward}


def unsupported(call: FinalizeForward | FinalizeBackward) -> str | None:
    """Why this step cannot be taken here, in one line, or None: statistics must be fp32, what else there is fp32 or bf16."""
    of = call.operand
    if of.dtype is not torch.float32 or of.dim() != 1:
        return f"batch statistics must be fp32 vectors, not {of.dtype}"
    if isinstance(call, FinalizeBackward):
        return None
    if call.unmerged is not None:
        return "statistics of tiles are merged where they are found"
    running = call.running_mean, call.running_var
    if any(v.dtype is not torch.float32 for v in (call.var, *(call.behind or ()))):
        return "means and variances of different dtypes"
    if any(r is not None and not r.is_contiguous() for r in running):
        return "running statistics must be contiguous to be updated in place"
    for parameter in (call.weight, call.bias, *running):
        if parameter is not None and parameter.dtype not in ELEMENT_CODES:
            return f"a batch norm's {parameter.dtype} parameters are neither fp32 nor bf16"
    return None
