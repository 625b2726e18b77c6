"""The residual join: normalise (+ gate) + add (+ the shortcut's normalise) + activation in one sweep, statistics where a BN follows.

Of a sum without a batch norm in either operand, with a ReLU or nothing behind it, backward needs the result alone: no operand is kept.
A gated operand is what a squeeze deferred: it gets the gradient at what the gate multiplies, in a sweep of its own behind the join's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.activation import activate
from bnrestructure.core.edges import Join, Transform, per_channel, statistics_factors
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import JoinBackward, JoinForward, JoinGradients, NormaliseBackward, SweepGradients
from bnrestructure.kernels.operands import readable
from bnrestructure.kernels.unmerged import Unmerged, Wanted
from bnrestructure.ops.concat import own_gradient
from bnrestructure.ops.dispatch import guard_second_derivative, in_format_of, with_room
from bnrestructure.ops.gate import gated_operand
from bnrestructure.ops.statistics import statistics as compute_statistics
from bnrestructure.ops.sweeps import normalise

__all__ = ["ResidualOutputs", "is_told_by_sum", "operand_gradients", "residual"]


class ResidualOutputs(NamedTuple):
    """out [N, C, *spatial]; mean, var [C] and size of it when statistics were asked for, and what is to be merged into them before that."""

    out: Tensor
    mean: Tensor | None
    var: Tensor | None
    size: torch.Size | None
    unmerged: Unmerged | None = None


def residual(
    y: Tensor,
    transform: Transform,
    r: Tensor,
    r_transform: Transform = Transform(),  # noqa: B008  # a tuple
    *,
    act: str = "identity",
    gain: Tensor | None = None,
    r_gain: Tensor | None = None,
    statistics: Wanted = False,
    backend: str = "auto",
) -> ResidualOutputs:
    """``out = act(((y - mean) * scale + beta) * gate + shortcut)``; the shortcut is r, or r normalised with its own vectors.

    The activation is the sum's: of the transforms the vectors and y's gate (ops/gate.py) are applied. y without vectors is added as it is;
    y and r then get *the same tensor* for a gradient, under the conditions below.

    With ``gain`` (the output of that name of y's producer) the gradient G of the sum itself is handed to y's edge, its factor s =
    scale as the gain's gradient, and *the same tensor* to r: nobody may write to it before y's producer has read it, which the pass that
    sets ``gain`` must have made sure. Without it y's gradient is a tensor of its own, scale * G. ``r_gain`` is the same for a normalised r.
    """
    if y.shape != r.shape:
        return _broadcast_join(y, transform, r, r_transform, act, bool(statistics), backend)
    if y.dtype != r.dtype:
        dtype = torch.promote_types(y.dtype, r.dtype)
        y, r = readable(y).to(dtype), readable(r).to(dtype)
    if transform.gate is not None:
        y, transform = gated_operand(y, transform, backend)
    vectors = *transform[:3], transform.gate
    out, omean, ovar, left = _Residual.apply(y, *vectors, r, *r_transform[:3], gain, r_gain, act, statistics, backend)
    return ResidualOutputs(out, omean, ovar, out.shape if statistics else None, left)


def _broadcast_join(
    y: Tensor,
    transform: Transform,
    r: Tensor,
    r_transform: Transform,
    act: str,
    statistics: bool,
    backend: str,
) -> ResidualOutputs:
    """The join of two tensors of different shapes, as PyTorch broadcasts them: in separate steps."""
    if transform.mean is not None or transform.gate is not None:
        y = normalise(y, transform._replace(act="identity"), backend=backend).z
    # Without vectors the add hands the caller's own gradient down, and the chain behind r will write to it.
    r = own_gradient(r) if r_transform.mean is None else normalise(r, Transform(*r_transform[:3]), backend=backend).z
    out = activate(readable(y) + readable(r), act)
    if not statistics:
        return ResidualOutputs(out, None, None, None)
    found = compute_statistics(out, backend=backend)
    return ResidualOutputs(out, found.mean, found.var, found.size)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        beta: Tensor | None,
        gate: Tensor | None,
        r: Tensor,
        r_mean: Tensor | None,
        r_scale: Tensor | None,
        r_beta: Tensor | None,
        gain: Tensor | None,
        r_gain: Tensor | None,
        act: str,
        statistics: Wanted,
        backend: str,
    ) -> Any:
        join = Join(y, Transform(mean, scale, beta, gate=gate), r, Transform(r_mean, r_scale, r_beta), act)
        out, omean, ovar = registry.run(backend, JoinForward(join, y.dtype, statistics))
        left = None
        if type(omean) is Unmerged:
            omean, ovar, left = with_room(omean)
        ctx.act, ctx.backend = act, backend
        ctx.has_gain, ctx.has_r_gain = gain is not None, r_gain is not None
        # Backward reads out for its statistics alone (and under an activation eager would have saved it, too): without them the caller
        # may overwrite it, as after eager's add.
        kept = out if statistics or act != "identity" else None
        ctx.by_sum = is_told_by_sum(join)
        kept_y, kept_r = (None if gate is None else y, None) if ctx.by_sum else (y, r)
        ctx.save_for_backward(kept_y, mean, scale, beta, gate, kept_r, r_mean, r_scale, r_beta, kept, omean)
        ctx.set_materialize_grads(False)
        return out, omean, ovar, left

    @staticmethod
    def backward(ctx: Any, dout: Any, dmean: Any, dvar: Any, _: Any) -> Any:
        x, mean, scale, beta, gate, r, r_mean, r_scale, r_beta, out, omean = ctx.saved_tensors
        statistics = None
        if dmean is not None or dvar is not None:
            statistics = (*statistics_factors(out, omean, dmean, dvar), omean)
        if dout is None:
            if statistics is None:
                return (None,) * 14
            dout = torch.zeros_like(out)
        transform = Transform(mean, scale, beta, gate=gate)
        total = dout if out is None else out  # without an activation nobody asks for its values
        operands = (total, Transform(), total, Transform()) if ctx.by_sum else (x, transform, r, Transform(r_mean, r_scale, r_beta))
        join = Join(*operands, ctx.act)
        found = registry.run(ctx.backend, JoinBackward(dout, statistics, join, out))
        if found.g.untyped_storage()._cdata == dout.untyped_storage()._cdata:
            # A join without an activation: the chains behind r will write to g, and dout may be the caller's.
            found = found._replace(g=found.g.clone())
        needs = ctx.needs_input_grad
        gated = None if gate is None else registry.run(ctx.backend, NormaliseBackward(found.g, x, transform))
        left, right = (join.y if gate is None else x, scale, needs[1], ctx.has_gain), (join.r, r_scale, needs[6], ctx.has_r_gain)
        return guard_second_derivative((*operand_gradients(left, right, found, gated), None, None, None))


def is_told_by_sum(join: Join) -> bool:
    """Whether the join's backward needs no operand, for its result tells all: a ReLU's mask is the same at ``out + out`` as at ``y + r``.

    A gated operand's sums are not the join's to take.
    """
    return (join.ty.mean is None or join.ty.gate is not None) and join.tr.mean is None and join.act in ("identity", "relu")


def operand_gradients(
    left: tuple[Tensor, Tensor | None, bool, bool],
    right: tuple[Tensor, Tensor | None, bool, bool],
    found: JoinGradients,
    gated: SweepGradients | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of y, its mean, scale, beta and gate, the first four of r, gain and r_gain, from those at the sum.

    An operand is (its tensor, its scale, whether its mean needs a gradient, whether its producer applies the scale). ``gated`` is what the
    sweep behind the join found for a gated y, whose vectors get their gradients from the squeeze that deferred it.
    """
    (y, scale, needs_mean, has_gain), (r, r_scale, needs_r_mean, has_r_gain) = left, right
    g, sum_g, sum_gy, sum_gr = found
    dgain: Tensor | None = None
    of_y: tuple[Tensor | None, ...] = in_format_of(y, g), None, None, None, None
    if gated is not None:
        of_y = in_format_of(y, gated.dx), None, None, None, gated.gate
    elif scale is not None:
        dy, dgain = (g, scale) if has_gain else (_scaled(g, scale), None)
        of_y = in_format_of(y, dy), -scale * sum_g if needs_mean else None, sum_gy, sum_g, None
    if r_scale is None:
        return *of_y, in_format_of(r, g), None, None, None, dgain, None
    dr, dr_gain = (g, r_scale) if has_r_gain else (_scaled(g, r_scale), None)
    of_r = (in_format_of(r, dr), -r_scale * sum_g if needs_r_mean else None, sum_gr, sum_g)
    return *of_y, *of_r, dgain, dr_gain


def _scaled(g: Tensor, scale: Tensor) -> Tensor:
    return (g * per_channel(scale, g)).to(g.dtype)
