"""What answers each call that is no convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnrestructure.kernels import calls
from bnrestructure.kernels.cuda.max_pool import max_pool_backward, max_pool_forward
from bnrestructure.kernels.cuda.output_gradient import output_gradient_sweep
from bnrestructure.kernels.cuda.residual import residual_backward, residual_forward
from bnrestructure.kernels.cuda.statistics import finalize_backward, finalize_forward, statistics_backward, statistics_forward
from bnrestructure.kernels.cuda.sweeps import normalise_backward, normalise_forward, squeeze_backward, squeeze_forward

__all__ = ["RUN"]


def _statistics_forward(c: calls.StatisticsForward) -> calls.StatisticsResult:
    return calls.StatisticsResult(*statistics_forward(c.x, c.out, "unmerged" if c.unmerged else True))


def _normalise_forward(c: calls.NormaliseForward) -> Any:
    return normalise_forward(c.x, c.transform, dtype=c.dtype, out=c.out, r=c.r)


def _normalise_backward(c: calls.NormaliseBackward) -> calls.SweepGradients:
    return calls.SweepGradients(*normalise_backward(c.dz, c.x, c.transform, accumulate=c.accumulate, factor=c.factor, factors=c.factors))


def _squeeze_forward(c: calls.SqueezeForward) -> Any:
    return squeeze_forward(c.x, c.transform, dtype=c.dtype)


def _squeeze_backward(c: calls.SqueezeBackward) -> calls.SweepGradients:
    return calls.SweepGradients(*squeeze_backward(c.dpooled, c.dz, c.x, c.transform, accumulate=c.accumulate))


def _join_forward(c: calls.JoinForward) -> calls.JoinResult:
    return calls.JoinResult(*residual_forward(*c.join.operands, dtype=c.dtype, statistics=c.statistics, into=c.out))


def _join_backward(c: calls.JoinBackward) -> calls.JoinGradients:
    z = c.join.y if c.z is None else c.z  # nothing of it is read then
    found = residual_backward(c.dz, c.statistics, *c.join.operands[:-1], z, c.join.act, factor=c.factor, more=c.accumulate)
    return calls.JoinGradients(*found)


def _max_pool_forward(c: calls.MaxPoolForward) -> calls.MaxPoolResult:
    return calls.MaxPoolResult(*max_pool_forward(c.x, c.transform, c.geometry, dtype=c.dtype))


def _max_pool_backward(c: calls.MaxPoolBackward) -> calls.SweepGradients:
    return calls.SweepGradients(*max_pool_backward(c.dy, c.index, c.x, c.transform, c.geometry, accumulate=c.accumulate))


RUN: dict[type[calls.Call[Any]], Callable[[Any], Any]] = {
    calls.StatisticsForward: _statistics_forward,
    calls.StatisticsBackward: statistics_backward,
    calls.NormaliseForward: _normalise_forward,
    calls.NormaliseBackward: _normalise_backward,
    calls.SqueezeForward: _squeeze_forward,
    calls.SqueezeBackward: _squeeze_backward,
    calls.JoinForward: _join_forward,
    calls.JoinBackward: _join_backward,
    calls.MaxPoolForward: _max_pool_forward,
    calls.MaxPoolBackward: _max_pool_backward,
    calls.FinalizeForward: finalize_forward,
    calls.FinalizeBackward: finalize_backward,
    calls.OutputGradient: output_gradient_sweep,
}
