"""Batch statistics over every dimension but the channel's, their backward, and the per-channel finalize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import accumulation_dtype, per_channel
from bnrestructure.kernels.calls import (
    Call,
    FinalizeBackward,
    FinalizeForward,
    FinalizeGradients,
    FinalizeResult,
    StatisticsBackward,
    StatisticsForward,
    StatisticsResult,
)
from bnrestructure.kernels.momentum import counted
from bnrestructure.kernels.operands import readable
from bnrestructure.kernels.rounding import dithered
from bnrestructure.kernels.unmerged import merged

__all__ = ["RUN", "statistics_forward"]


def statistics_forward(call: StatisticsForward) -> StatisticsResult:
    """mean and biased var [C] of x, over all but the channel: the sum of centred squares, since E[x^2] - E[x]^2 cancels."""
    x = call.x if call.out is None else call.out.copy_(call.x)
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1], dtype=accumulation_dtype(x.dtype))
        return StatisticsResult(zeros, zeros.clone())
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), dim=dims, correction=0)
    return StatisticsResult(mean, var)


def statistics_backward(call: StatisticsBackward) -> Tensor:
    """``a * (x - mean) + b``, the gradient at x of its mean and variance, added to ``accumulate`` where it is given."""
    x, (a, b), accumulate = call.x, call.factors, call.accumulate
    d = per_channel(a, x) * (x.to(a.dtype) - per_channel(call.mean, x)) + per_channel(b, x)
    if accumulate is None:
        return d.to(x.dtype)
    return accumulate.copy_(dithered(accumulate.to(d.dtype) + d, accumulate.dtype))


def finalize_forward(call: FinalizeForward) -> FinalizeResult:
    """``rstd = 1 / sqrt(var + eps)``, ``scale = weight * rstd`` and beta, each [C]; the running statistics move in place."""
    mean, var, momentum = call.mean, call.var, counted(call.batches, call.momentum)
    if call.unmerged is not None:
        for room, found in zip(call.behind or (mean, var), merged(call.unmerged), strict=True):
            room.copy_(found)
    if call.behind is not None:
        mean, var = (torch.cat((readable(v), readable(behind))) for v, behind in zip((mean, var), call.behind, strict=True))
    rstd = torch.rsqrt(var + call.eps)
    scale = rstd.clone() if call.weight is None else call.weight.to(rstd.dtype) * rstd
    beta = torch.zeros_like(rstd) if call.bias is None else call.bias.to(rstd.dtype).clone()
    if call.running_mean is not None:
        _move(call.running_mean, mean, momentum)
    if call.running_var is not None:
        _move(call.running_var, var * (call.count / (call.count - 1)), momentum)
    return FinalizeResult(rstd, scale, beta, mean, var)


def _move(running: Tensor, value: Tensor, momentum: float) -> None:
    """``running = (1 - momentum) * running + momentum * value``, in place.

    Through ``.data``, which leaves the version counter alone, as PyTorch's own batch norm does: it saves the running statistics for its
    backward, and where it shares them with this (an earlier call of the same layer was left to it) autograd would refuse.
    """
    running.data.copy_(running.to(value.dtype) * (1 - momentum) + value * momentum)


def finalize_backward(call: FinalizeBackward) -> FinalizeGradients:
    """The gradients at mean, var and weight, each [C], from those at scale and beta."""
    dscale, rstd, scale = call.dscale, call.rstd, call.scale
    mean, var = -scale * call.dbeta, dscale * scale * rstd.pow(2) * -0.5
    return FinalizeGradients(
        mean if call.dmean is None else mean + call.dmean, var if call.dvar is None else var + call.dvar, dscale * rstd
    )


#: What answers each call.
RUN: dict[type[Call[Any]], Callable[[Any], Any]] = {
    StatisticsForward: statistics_forward,
    StatisticsBackward: statistics_backward,
    FinalizeForward: finalize_forward,
    FinalizeBackward: finalize_backward,
}
