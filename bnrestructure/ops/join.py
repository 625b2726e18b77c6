"""A residual join and the convolution that reads its sum, as one node.

Forward, the sum is formed in the convolution's prologue and stored on the way, for its other readers. Backward, the convolution's
dgrad completes the gradient of the sum: its epilogue adds the other readers' share, applies the activation's mask, takes the sums of both
operands' batch norms, and stores what both operands share: the gradient *before* the mask never reaches memory. Where a kernel cannot
(kernels/join.py) the join's own sweep does its part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import Join, Transform, accumulation_dtype
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import ConvBackward, ConvForward, JoinBackward, JoinGradients, NormaliseBackward
from bnrestructure.kernels.unmerged import Unmerged
from bnrestructure.ops.casts import cast_weight
from bnrestructure.ops.conv_options import ConvOptions, Shortcut, backward_edge, destination
from bnrestructure.ops.dispatch import compute_dtype, guard_second_derivative, with_room
from bnrestructure.ops.gate import is_by_channel
from bnrestructure.ops.residual import is_told_by_sum, operand_gradients
from bnrestructure.ops.slots import incoming_gradient

__all__ = ["JoinConv", "join_is_fusible"]


def join_is_fusible(x: Tensor, transform: Transform, shortcut: Shortcut, weight: Tensor) -> bool:
    """Whether one node can do it: no broadcasting, no promotion, and the sum is stored in the dtype that the convolution reads. A gate
    is one that kernels know.

    Nor where none of the join's operands takes part in backward: the convolution alone then has no input gradient to compute.
    """
    r, gate = shortcut.r, transform.gate
    same = x.shape == r.shape and x.dtype == r.dtype == compute_dtype(x) and (gate is None or is_by_channel(x, gate))
    if not same or x.dim() != weight.dim() or torch.compiler.is_compiling():
        return False
    operands = (x, *transform[:3], gate, *shortcut[:4])
    return not torch.is_grad_enabled() or any(t is not None and t.requires_grad for t in operands)


class JoinConv(torch.autograd.Function):
    """``z = act(tx(x) * gate + tr(r))``, then the convolution of z: (y, mean, var, z if chained, its gain if ``gain``)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        beta: Tensor | None,
        gate: Tensor | None,
        r: Tensor,
        r_mean: Tensor | None,
        r_scale: Tensor | None,
        r_beta: Tensor | None,
        x_gain: Tensor | None,
        r_gain: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        into: Tensor | None,
        options: ConvOptions,
    ) -> Any:
        buffer, out, written = destination(x, weight, into, options)
        join = Join(x, Transform(mean, scale, beta, gate=gate), r, Transform(r_mean, r_scale, r_beta), options.act)
        z = kept_activation(x.shape, options.dtype, x.device)
        cast = cast_weight(weight, options.dtype, options.geometry)
        call = ConvForward(z, Transform(), weight, bias, options.geometry, options.dtype, options.statistics, out, join, cast)
        y, ymean, yvar = registry.run(options.backend, call)
        left = None
        if type(ymean) is Unmerged:
            ymean, yvar, left = with_room(ymean)
        ctx.options, ctx.has_bias, ctx.written = options, bias is not None, written
        ctx.has_gain, ctx.has_r_gain = x_gain is not None, r_gain is not None
        kept = y if options.statistics else None
        ctx.by_sum = is_told_by_sum(join)
        kept_x, kept_r = (None if gate is None else x, None) if ctx.by_sum else (x, r)
        ctx.save_for_backward(kept_x, mean, scale, beta, gate, kept_r, r_mean, r_scale, r_beta, z, weight, cast, kept, ymean)
        ctx.set_materialize_grads(False)
        gain = torch.empty(weight.shape[0], dtype=accumulation_dtype(y.dtype), device=y.device) if options.gain else None
        if options.chain and True not in ctx.needs_input_grad[:9]:
            ctx.mark_non_differentiable(z)  # as eager's sum of such operands: the weight's gradient is no reason for one at z
        return y if buffer is None else buffer, ymean, yvar, z if options.chain else None, gain, left

    @staticmethod
    def backward(ctx: Any, dresult: Any, dmean: Any, dvar: Any, dz: Any, dgain: Any, _: Any) -> Any:
        options: ConvOptions = ctx.options
        x, mean, scale, beta, gate, r, r_mean, r_scale, r_beta, z, weight, cast, y, ymean = ctx.saved_tensors
        transform, needs = Transform(mean, scale, beta, gate=gate), ctx.needs_input_grad
        operands = (z, Transform(), z, Transform()) if ctx.by_sum else (x, transform, r, Transform(r_mean, r_scale, r_beta))
        join = Join(*operands, options.act)
        dy, dinto = dresult, None
        if dresult is not None and ctx.written is not None:
            dy, dinto = incoming_gradient(ctx.written, dresult)
        dweight = dbias = None
        if dy is None and dmean is None and dvar is None:  # only the sum's other readers take part
            if dz is None:
                return guard_second_derivative((None,) * 15)
            gradients = registry.run(options.backend, JoinBackward(dz, None, join, z))
        else:
            wanted = True, needs[11], ctx.has_bias and needs[12]
            dy = torch.zeros_like(y) if dy is None else dy
            edge = backward_edge(dgain, dmean, dvar, y, ymean)
            call = ConvBackward(dy, edge, z, Transform(), weight, options.geometry, options.dtype, wanted, dz, join, cast)
            found = registry.run(options.backend, call)
            assert found.dx is not None
            assert found.sum_p is not None
            gradients = JoinGradients(found.dx, found.sum_p, found.sum_px, found.sum_pr)
            dweight, dbias = found.weight, found.bias
        gated = None if gate is None else registry.run(options.backend, NormaliseBackward(gradients.g, x, transform))
        left = join.y if gate is None else x, scale, needs[1], ctx.has_gain
        right = join.r, r_scale, needs[6], ctx.has_r_gain
        return guard_second_derivative((*operand_gradients(left, right, gradients, gated), dweight, dbias, dinto, None))
