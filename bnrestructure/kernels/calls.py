"""The calls that kernels answer, one record each, and what each gives back.

Activations are [N, C, *spatial], of any strides. Vectors are per channel, [C], in the accumulation dtype (core/edges.py). ``dtype`` is
what a call computes and stores in. Forward calls give fresh tensors, or write to ``out`` (any strides: a channel slice of a concat buffer);
backward ones add to ``accumulate``, of x's shape, in place where it is given, and hand it back.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, PoolGeometry, Transform, divided
from bnrestructure.core.records import record
from bnrestructure.kernels.unmerged import Mean, Unmerged, Wanted

__all__ = [
    "Call",
    "ConvBackward",
    "ConvForward",
    "ConvResult",
    "FinalizeBackward",
    "FinalizeForward",
    "FinalizeGradients",
    "FinalizeResult",
    "JoinBackward",
    "JoinForward",
    "JoinGradients",
    "JoinResult",
    "Kernels",
    "MaxPoolBackward",
    "MaxPoolForward",
    "MaxPoolResult",
    "NormaliseBackward",
    "NormaliseForward",
    "OutputGradient",
    "OutputGradientResult",
    "SqueezeBackward",
    "SqueezeForward",
    "StatisticsBackward",
    "StatisticsForward",
    "StatisticsResult",
    "SweepGradients",
]

R = TypeVar("R")


class Call(Generic[R]):
    """A kernel call whose result is an R."""

    __slots__ = ()

    #: The tensor whose device and number of dimensions decide who answers.
    operand = property(attrgetter("x"))


class Kernels(Protocol):
    """An implementation of kernels: for a device, in plain PyTorch, or made of another one's."""

    def supports(self, call: Call[Any]) -> str | None:
        """Why it cannot answer the call, in one line, or None. The call's tensors may be on the meta device."""

    def run(self, call: Call[R]) -> R:
        """The call's result. Raises UnsupportedCallError where it cannot answer, before anything is written."""


# --- the convolution ---------------------------------------------------------------------------------------------------


class ConvResult(NamedTuple):
    """y [N, C_out, *spatial_out] in the call's dtype; mean and biased var [C_out] of y *as stored*, or None.

    Where the call has it so, the mean may be an Unmerged, and var is None then: here, in JoinResult and in StatisticsResult.
    """

    y: Tensor
    mean: Mean
    var: Tensor | None


@record
class ConvForward(Call[ConvResult]):
    """``y = conv(transform(x), weight) + bias``, and y's statistics; weight [C_out, C_in / groups, *kernel], bias [C_out].

    With ``join`` x is dense uninitialised memory in ``dtype`` for that join's sum, which is written first; the transform is the identity
    then. The reference gives x the strides of its operands' sum. ``cast`` is the weight in ``dtype``, where somebody has it: kernels may
    read it in the weight's place.
    """

    x: Tensor
    transform: Transform
    weight: Tensor
    bias: Tensor | None
    geometry: ConvGeometry
    dtype: torch.dtype
    statistics: Wanted = False
    out: Tensor | None = None
    join: Join | None = None
    cast: Tensor | None = None


@record
class ConvBackward(Call[ConvGradients]):
    """Gradients of :class:`ConvForward`; ``needs`` = (dx and the sums, weight, bias). ``dy`` is the P of the backward edge.

    With ``join``, of which x is the sum, dx is G of that join: the gradient at the sum, mask applied, what both operands share.
    ``accumulate`` is the gradient of the sum's other readers then: it is added first, and its memory may be used for G.
    ``cast`` is the forward call's; the weight's gradient is in the weight's own dtype.
    """

    dy: Tensor
    edge: BackwardEdge
    x: Tensor
    transform: Transform
    weight: Tensor
    geometry: ConvGeometry
    dtype: torch.dtype
    needs: tuple[bool, bool, bool] = (True, True, True)
    accumulate: Tensor | None = None
    join: Join | None = None
    cast: Tensor | None = None


class OutputGradientResult(NamedTuple):
    """d, in the call's dtype, and the sum of dY by channel, [C_out] fp32, or None."""

    d: Tensor
    bias: Tensor | None


@record
class OutputGradient(Call[OutputGradientResult]):
    """``d = factor * dY``, dY the gradient at a convolution's output by its backward edge, and with ``bias`` the sum of dY.

    The sum is taken before anything is rounded: behind a batch norm it is zero, and what is rounded off would be all of it.
    """

    dy: Tensor
    edge: BackwardEdge
    dtype: torch.dtype
    factor: float = 1.0
    bias: bool = False

    operand = property(attrgetter("dy"))


# --- the residual join -------------------------------------------------------------------------------------------------


class JoinResult(NamedTuple):
    """z in the call's dtype; mean and biased var [C] of z as stored, or None."""

    z: Tensor
    mean: Mean
    var: Tensor | None


@record
class JoinForward(Call[JoinResult]):
    """``z = act(ty(y) + tr(r))``, and its statistics. ``out`` is in ``dtype``."""

    join: Join
    dtype: torch.dtype
    statistics: Wanted = False
    out: Tensor | None = None

    operand = property(attrgetter("join.y"))


class JoinGradients(NamedTuple):
    """What the backward of a residual join gives.

    g         G, the gradient at the sum, in z's dtype: the P of both operands.       sum_p    sum G, [C].
    sum_py    sum G * (y - ty.mean), [C]; None without such a mean, and with a gate: the sweep behind the join takes that operand's sums.
    sum_pr    sum G * (r - tr.mean), [C]; None without such a mean.
    """

    g: Tensor
    sum_p: Tensor
    sum_py: Tensor | None
    sum_pr: Tensor | None


@record
class JoinBackward(Call[JoinGradients]):
    """G of a join from the gradient at z, ``factor * dz``.

    ``statistics`` = (a, b, mean of z): the gradient at z gains ``a * (z - mean) + b``, and G is rounded so that it is kept on average. z
    may be None without them. ``accumulate`` is added first, and its memory may be used for G.
    """

    dz: Tensor
    statistics: tuple[Tensor, Tensor, Tensor] | None
    join: Join
    z: Tensor | None
    factor: float = 1.0
    accumulate: Tensor | None = None

    operand = property(attrgetter("join.y"))


# --- sweeps of one tensor ----------------------------------------------------------------------------------------------


class SweepGradients(NamedTuple):
    """dx in x's dtype; SP and SPX (core/edges.py), None without a mean.

    gate [N, C]: with a gate dx is the gradient at the gate's input, and there are no sums; see :class:`ConvGradients`.
    """

    dx: Tensor
    sum_p: Tensor | None
    sum_px: Tensor | None
    gate: Tensor | None = None


@record
class NormaliseForward(Call[Tensor]):
    """``z = act((x - mean) * scale + beta) * gate + r`` in ``dtype``; r, of x's shape, is in ``dtype``, too."""

    x: Tensor
    transform: Transform
    dtype: torch.dtype
    out: Tensor | None = None
    r: Tensor | None = None


@record
class NormaliseBackward(Call[SweepGradients]):
    """The gradients from that at z, ``factor * factors * dz``.

    ``factors``, [N, C] in the accumulation dtype, are for a transform without a gate.
    """

    dz: Tensor
    x: Tensor
    transform: Transform
    accumulate: Tensor | None = None
    factor: float = 1.0
    factors: Tensor | None = None


class StatisticsResult(NamedTuple):
    """Mean and biased variance, each [C]."""

    mean: Mean
    var: Any


@record
class StatisticsForward(Call[StatisticsResult]):
    """The statistics of x over everything but the channel, from centred sums; zeros where there are no values.

    x is copied to ``out``, of its shape and dtype, on the way.
    """

    x: Tensor
    out: Tensor | None = None
    unmerged: bool = False


@record
class StatisticsBackward(Call[Tensor]):
    """``a * (x - mean) + b`` in x's dtype, or added to ``accumulate``. With ``count`` a and b are what they are in a BackwardEdge."""

    x: Tensor
    mean: Tensor
    a: Tensor
    b: Tensor
    accumulate: Tensor | None = None
    count: int | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """a and b of the formula."""
        return (self.a, self.b) if self.count is None else divided(self.a, self.b, self.count)


@record
class SqueezeForward(Call[Tensor]):
    """The mean of transform(x) over the spatial positions, [N, C] in ``dtype``: a global average pool."""

    x: Tensor
    transform: Transform
    dtype: torch.dtype


@record
class SqueezeBackward(Call[SweepGradients]):
    """The gradients from that at z, ``dpooled[n, c] / positions + dz``; dz comes from the gated readers of the same z.

    ``dz`` may be the same tensor as ``accumulate``, which is *overwritten* then.
    """

    dpooled: Tensor
    dz: Tensor | None
    x: Tensor
    transform: Transform
    accumulate: Tensor | None = None


class MaxPoolResult(NamedTuple):
    """y in the call's dtype, and the uint8 position of each maximum in its window, counted row by row, padding included."""

    y: Tensor
    places: Tensor


@record
class MaxPoolForward(Call[MaxPoolResult]):
    """The max pool of transform(x). 2-D only; at most 255 window positions; on a tie the first is taken, as PyTorch does."""

    x: Tensor
    transform: Transform
    geometry: PoolGeometry
    dtype: torch.dtype


@record
class MaxPoolBackward(Call[SweepGradients]):
    """The gradients from that at the pool's result."""

    dy: Tensor
    index: Tensor
    x: Tensor
    transform: Transform
    geometry: PoolGeometry
    accumulate: Tensor | None = None


# --- the step between the halves of a batch norm -----------------------------------------------------------------------


class FinalizeResult(NamedTuple):
    """rstd = 1 / sqrt(var + eps), scale = weight * rstd, beta = bias (zeros without one), each [C] in mean's dtype.

    ``mean`` and ``var`` are those of the call, with what is behind them.
    """

    rstd: Tensor
    scale: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor


@record
class FinalizeForward(Call[FinalizeResult]):
    """rstd, scale and beta; the running statistics, [C], are updated in place, with the unbiased variance.

    ``count`` is the number of values of each channel. ``batches``, a layer's num_batches_tracked, is counted up by one, in place.
    ``momentum`` is this batch's share in the running statistics, None for all batches alike: 1 / batches. ``behind`` is (mean, var) of the
    channels that follow those of ``mean`` and ``var``, where there are more: C counts all of them. With ``unmerged`` the last mean and var
    are memory for what it merges to.
    """

    mean: Tensor
    var: Tensor
    count: int | Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float | None
    eps: float
    batches: Tensor | None = None
    behind: tuple[Tensor, Tensor] | None = None
    unmerged: Unmerged | None = None

    operand = property(attrgetter("mean"))


class FinalizeGradients(NamedTuple):
    """``mean = -scale dbeta + dmean``, ``var = -1/2 scale rstd^2 dscale + dvar`` and ``weight = rstd dscale``, each [C]."""

    mean: Tensor
    var: Tensor
    weight: Tensor


@record
class FinalizeBackward(Call[FinalizeGradients]):
    """The gradients of mean, var and weight from those of scale and beta.

    Mean and beta are read together, in ``(x - mean) * scale + beta``, so that mean's gradient follows from beta's. ``scale`` is the one
    that the readers have multiplied by: over a batch their gradients and mean's sum to zero, but for another rounding of it. ``dmean`` and
    ``dvar`` are the gradients that other readers of the statistics have made, or None.
    """

    dscale: Tensor
    dbeta: Tensor
    rstd: Tensor
    scale: Tensor
    dmean: Tensor | None = None
    dvar: Tensor | None = None

    operand = property(attrgetter("rstd"))
