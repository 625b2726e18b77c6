"""Batch statistics over every dimension but the channel's, their backward, and the per-channel finalize."""

from __future__ import annotations

import torch
from torch import Tensor

from bnrestructure.core.edges import accumulation_dtype, per_channel
from bnrestructure.kernels.rounding import dithered

__all__ = ["finalize_backward", "finalize_forward", "statistics_backward", "statistics_forward"]


def statistics_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``x`` [N, C, *spatial], each [C], in the accumulation dtype; centred sums; zeros of no values."""
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1], dtype=accumulation_dtype(x.dtype))
        return zeros, zeros.clone()
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), dim=dims, correction=0)
    return mean, var


def statistics_backward(x: Tensor, mean: Tensor, a: Tensor, b: Tensor, accumulate: Tensor | None) -> Tensor:
    """``a * (x - mean) + b``, in x's dtype, or added in place to ``accumulate``."""
    d = per_channel(a, x) * (x.to(a.dtype) - per_channel(mean, x)) + per_channel(b, x)
    if accumulate is None:
        return d.to(x.dtype)
    return accumulate.copy_(dithered(accumulate.to(d.dtype) + d, accumulate.dtype))


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
    """(rstd, scale, beta), each [C] in mean's dtype; updates the running statistics in place with the unbiased variance.

    scale = weight * rstd, beta = bias (zeros without one), rstd = 1 / sqrt(var + eps). ``momentum`` is the factor to use for
    this step (already 1 / num_batches_tracked for a cumulative average).
    """
    rstd = torch.rsqrt(var + eps)
    scale = rstd.clone() if weight is None else weight.to(rstd.dtype) * rstd
    beta = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype).clone()
    if running_mean is not None:
        _move(running_mean, mean, momentum)
    if running_var is not None:
        _move(running_var, var * (count / (count - 1)), momentum)
    return rstd, scale, beta


def _move(running: Tensor, value: Tensor, momentum: float | Tensor) -> None:
    """``running = (1 - momentum) * running + momentum * value``, in place.

    Through ``.data``, which leaves the version counter alone, as PyTorch's own batch norm does: it saves the running statistics for its
    backward, and where it shares them with this (an earlier call of the same layer was left to it) autograd would refuse.
    """
    running.data.copy_(running.to(value.dtype) * (1 - momentum) + value * momentum)


def finalize_backward(dscale: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dvar, dweight) from the gradient of scale: ``dweight = rstd * dscale``, ``dvar = -1/2 weight rstd^3 dscale``."""
    gamma = 1.0 if weight is None else weight.to(rstd.dtype)
    return dscale * gamma * rstd.pow(3) * -0.5, dscale * rstd
