"""The heart: one convolution node that carries a normalisation in its prologue and statistics in its epilogue.

    y, mean, var, ... = conv(x, Transform(mean, scale, beta, act, gate), weight, bias, geometry, statistics=True)

In the words of the paper: RCF when only an activation rides along, MVF when the statistics do, BNFF with both (section 4).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, Transform, accumulation_dtype
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import ConvBackward, ConvForward
from bnrestructure.kernels.unmerged import Unmerged, Wanted
from bnrestructure.ops import library
from bnrestructure.ops.casts import cast_weight
from bnrestructure.ops.conv_options import ConvOptions, Shortcut, backward_edge, check_shapes, destination
from bnrestructure.ops.dispatch import compute_dtype, guard_second_derivative, in_format_of, passed_on, with_room
from bnrestructure.ops.gate import gated_operand, with_gate
from bnrestructure.ops.join import JoinConv, join_is_fusible
from bnrestructure.ops.residual import residual
from bnrestructure.ops.slots import Slot, incoming_gradient
from bnrestructure.ops.unbatched import unbatched_conv

__all__ = ["ConvOutputs", "PlainConv", "conv"]


class ConvOutputs(NamedTuple):
    """What :func:`conv` returns; members that were not asked for are None.

    y      [N, C_out, *spatial_out]; with ``slot``, the concat buffer that y was written into
    mean, var, size     biased batch statistics of y, [C_out], and the size of the tensor that they are of
    passed the input, for its next reader (``chain``); behind a residual join, its sum
    unmerged what a finalize has to merge into mean and var before anyone reads them (``statistics="unmerged"``)
    gain   [C_out] whose values mean nothing: its *gradient* is the factor s of y's backward edge (``gain``)
    """

    y: Tensor
    mean: Tensor | None
    var: Tensor | None
    size: torch.Size | None
    passed: Tensor | None
    gain: Tensor | None
    unmerged: Unmerged | None = None


def conv(
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    statistics: Wanted = False,
    chain: bool = False,
    gain: bool = False,
    slot: Slot | None = None,
    shortcut: Shortcut | None = None,
    backend: str = "auto",
) -> ConvOutputs:
    """``y = conv(act((x - mean) * scale + beta) * gate, weight) + bias``; the transformed input never reaches memory.

    x [N, C_in, *spatial] raw; of the transform mean, scale, beta are [C_in] or all None, gate is None or a factor on z (ops/gate.py), for
    which x is what a squeeze deferred; weight [C_out, C_in / groups, *kernel]. x [C_in, *spatial], one image without a batch dimension,
    runs in its parts (ops/unbatched.py), and not into a slot. ``statistics`` adds y's biased mean and variance. ``chain`` returns x for its
    next reader, whose gradient this node's dgrad then accumulates into in place. ``slot`` is a place for y in a concat's buffer. With
    ``shortcut`` the prologue is a residual join, ``z = act(((x - mean) * scale + beta) * gate + shortcut)``. z is stored: ``chain`` returns
    it in place of x.

    Raises RuntimeError, in the words of PyTorch's convolution, on shapes or dtypes that do not fit.
    """
    if shortcut is not None and not join_is_fusible(x, transform, shortcut, weight):
        r, r_mean, r_scale, r_beta, x_gain, r_gain = shortcut
        r_transform = Transform(r_mean, r_scale, r_beta)
        joined = residual(x, transform, r, r_transform, act=transform.act, gain=x_gain, r_gain=r_gain, backend=backend)
        x, transform, shortcut = joined.out, Transform(), None
    autocast = torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
    if transform.gate is not None and shortcut is not None:
        x, transform = gated_operand(x, transform, backend)
    elif transform.gate is not None:
        x, transform = with_gate(x, transform, backend, casts=autocast)
    mean, scale, beta, act, gate = transform
    if not autocast and (x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype)):
        other, found = ("weight", weight.dtype) if x.dtype != weight.dtype or bias is None else ("bias", bias.dtype)
        raise RuntimeError(f"Input type ({x.dtype}) and {other} type ({found}) should be the same")
    dtype = compute_dtype(x)
    if x.dim() == weight.dim() - 1 and gate is None and slot is None:
        return ConvOutputs(*unbatched_conv(
            x, transform, weight, bias, geometry, wants_statistics=bool(statistics), chain=chain, gain=gain, backend=backend
        ))  # fmt: skip
    if torch.compiler.is_compiling() and not (chain or gain or slot is not None):
        check_shapes(x, weight, geometry)
        y, ymean, yvar = library.conv(
            x, mean, scale, beta, act, gate, weight, bias, geometry.flat, bool(statistics), dtype, backend
        )  # fmt: skip
        if not statistics:
            return ConvOutputs(y, None, None, None, None, None)
        return ConvOutputs(y, ymean, yvar, y.shape, None, None)
    into, offset, channels, visible = Slot() if slot is None else slot
    options = ConvOptions(act, geometry, statistics, chain, gain, offset, channels, visible, dtype, backend)
    if shortcut is None:
        y, ymean, yvar, passed, edge_gain, left = PlainConv.apply(x, mean, scale, beta, gate, weight, bias, into, options)
    else:
        y, ymean, yvar, passed, edge_gain, left = JoinConv.apply(x, mean, scale, beta, gate, *shortcut, weight, bias, into, options)
    size = torch.Size((y.shape[0], weight.shape[0], *y.shape[2:])) if statistics else None
    return ConvOutputs(y, ymean, yvar, size, passed, edge_gain, left)


class PlainConv(torch.autograd.Function):
    """The convolution without a residual join; :func:`conv` says what its arguments mean."""

    @staticmethod
    def forward(  # autograd.Function's forward takes whatever the node takes
        ctx: Any,
        x: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        beta: Tensor | None,
        gate: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        into: Tensor | None,
        options: ConvOptions,
    ) -> Any:
        transform = Transform(mean, scale, beta, options.act, gate)
        buffer, out, written = destination(x, weight, into, options)
        cast = cast_weight(weight, options.dtype, options.geometry)
        call = ConvForward(x, transform, weight, bias, options.geometry, options.dtype, options.statistics, out, None, cast)
        y, ymean, yvar = registry.run(options.backend, call)
        left = None
        if type(ymean) is Unmerged:
            ymean, yvar, left = with_room(ymean)
        ctx.options, ctx.has_bias, ctx.written = options, bias is not None, written
        ctx.save_for_backward(x, mean, scale, beta, gate, weight, cast, y if options.statistics else None, ymean)
        ctx.set_materialize_grads(False)
        result = y if buffer is None else buffer
        passed = passed_on(ctx, x) if options.chain else None
        gain = torch.empty(weight.shape[0], dtype=accumulation_dtype(y.dtype), device=y.device) if options.gain else None
        return result, ymean, yvar, passed, gain, left

    @staticmethod
    def backward(ctx: Any, dresult: Any, dmean: Any, dvar: Any, dpassed: Any, dgain: Any, _: Any) -> Any:
        options: ConvOptions = ctx.options
        x, mean, scale, beta, gate, weight, cast, y, ymean = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_x = True in needs[:5]
        if dresult is None and dmean is None and dvar is None:
            return guard_second_derivative((dpassed, *[None] * 8))
        dy, dinto = dresult, None
        if dresult is not None and ctx.written is not None:
            dy, dinto = incoming_gradient(ctx.written, dresult)
        edge = backward_edge(dgain, dmean, dvar, y, ymean)
        if dy is None:
            dy = torch.zeros_like(y)
        transform = Transform(mean, scale, beta, options.act, gate)
        wanted = needs_x, needs[5], ctx.has_bias and needs[6]
        call = ConvBackward(dy, edge, x, transform, weight, options.geometry, options.dtype, wanted, dpassed, None, cast)
        gradients = registry.run(options.backend, call)
        dx = in_format_of(x, gradients.dx) if needs_x else dpassed
        dmu = dscale = dbeta = None
        if gradients.sum_p is not None and mean is not None:
            dscale, dbeta = gradients.sum_px, gradients.sum_p
            dmu = -scale * dbeta if needs[1] else None
        dbias = gradients.bias
        return guard_second_derivative((dx, dmu, dscale, dbeta, gradients.gate, gradients.weight, dbias, dinto, None))
