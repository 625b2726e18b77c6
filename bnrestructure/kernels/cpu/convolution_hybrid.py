"""The dense convolution as ATen's own, between sweeps that apply the prologue and the epilogue (src/conv_sweeps.cpp).

Worth its extra passes over memory where ATen's product is faster by more than they cost; see convolution_choice.py. The
transformed input and the output gradient live in temporaries, and neither is kept for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.kernels.aten_convolution import convolution_backward
from bnrestructure.kernels.cpu import layout, library
from bnrestructure.kernels.cpu.convolution_arguments import Pixels, backward_arguments, forward_arguments, named_sums, pixels
from bnrestructure.kernels.layout import pitch_of
from bnrestructure.kernels.operands import readable, require_fit
from bnrestructure.kernels.rounding import gradient_factor, restored

__all__ = ["conv_backward", "conv_forward"]

_prologue = library.declare("bnr_conv_prologue", "p")
_statistics = library.declare("bnr_conv_statistics", "p")
_output_gradient = library.declare("bnr_conv_output_gradient", "p")
_input_gradient = library.declare("bnr_conv_input_gradient", "p")


def conv_forward(
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    statistics: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var) as kernels/reference says; x and the weight are float32 or bfloat16."""
    bias = None if bias is None else readable(bias).to(dtype)
    px = pixels(x, dtype)
    z = _transformed(px, transform, weight, geometry)
    y = torch.convolution(z, _weight(weight, dtype), bias, *geometry.aten_arguments)
    if out is not None:
        y = out.copy_(y)
    if not statistics:
        return y, None, None
    mean, var = torch.empty(2, weight.shape[0])
    keep: list[Tensor | None] = []
    _statistics(forward_arguments(px, transform, weight, None, geometry, pixels(y, dtype), mean, var, keep))
    return y, mean, var


def conv_backward(
    dy: Tensor,
    edge: BackwardEdge,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    accumulate: Tensor | None = None,
    join: Join | None = None,
) -> ConvGradients:
    """The gradients as kernels/reference says; dy, x and the weight are float32 or bfloat16. x is ``join``'s sum where there is one."""
    need_x, need_weight, need_bias = needs
    require_fit(x, transform)
    if join is not None:
        require_fit(x, join.ty, join.tr)
    px, pd = pixels(x, dtype), pixels(dy, dtype)
    keep: list[Tensor | None] = []
    db = torch.empty(weight.shape[0]) if need_bias else None
    factor = gradient_factor(edge.a is not None, dtype, torch.float32)
    if edge.s is not None or edge.a is not None or need_bias:
        d = layout.empty_like(pd[0])
        py = None if edge.a is None or edge.y is None else pixels(edge.y, dtype)
        _output_gradient(
            backward_arguments(
                pd, edge, py, px, transform, weight, geometry, keep, dx=(d, d.shape[1]), bias_gradient=db, factor=factor, whole="output"
            )
        )
        pd = d, d.shape[1]
    z = _transformed(px, transform, weight, geometry) if need_weight else px[0]
    g, dw = convolution_backward(pd[0], z, _weight(weight, dtype), geometry, need_input=need_x, need_weight=need_weight)
    dw = None if dw is None else restored(dw, factor, weight.dtype)
    db = None if db is None else db.to(dtype)
    if g is None:
        return ConvGradients(weight=dw, bias=db)
    pg = pixels(g, dtype)
    dx = accumulate if accumulate is not None and layout.destination(px[0], accumulate) is accumulate else pg[0]
    gate = None if transform.gate is None else torch.empty(transform.gate.shape)
    sums = torch.empty(2, x.shape[1]) if transform.mean is not None and gate is None else None
    if join is not None:
        sums = torch.empty(3, x.shape[1])
        if accumulate is not None and dx is not accumulate:  # the mask comes after the sum
            dx = accumulate = layout.empty_like(px[0]).copy_(accumulate)
    if not (transform.is_identity and join is None and dx is pg[0] and factor == 1):
        _input_gradient(
            backward_arguments(
                pg,
                BackwardEdge(),
                None,
                px,
                transform,
                weight,
                geometry,
                keep,
                dx=(dx, pitch_of(dx)),
                accumulate=dx is accumulate,
                sums=sums,
                gate=gate,
                factor=factor,
                join=join,
                whole="input",
            )
        )
    if dx is not accumulate:
        dx = dx.to(x.dtype) if accumulate is None else accumulate.add_(dx.to(accumulate.dtype))
    return ConvGradients(
        dx,
        **named_sums(sums, join),
        gate=None if gate is None or transform.gate is None else gate.to(transform.gate.dtype),
        weight=dw,
        bias=db,
    )


def _transformed(x: Pixels, transform: Transform, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """The convolution's real input; x itself where there is nothing to apply."""
    if transform.is_identity:
        return x[0]
    z = layout.empty_like(x[0])
    keep: list[Tensor | None] = []
    _prologue(forward_arguments(x, transform, weight, None, geometry, (z, z.shape[1]), None, None, keep, prologue=True))
    return z


def _weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In the compute dtype, and channels_last, so that the result is channels_last, too."""
    return readable(weight).to(dtype).contiguous(memory_format=torch.channels_last)
