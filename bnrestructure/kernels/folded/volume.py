"""The convolution node for kernels that are 3-D in earnest: ATen's product between the sweeps of the device.

The transformed input and the output gradient live in temporaries, and neither is kept for backward. ``sweeps`` are the device's kernels
for activations of any number of dimensions (:class:`bnrestructure.kernels.folded.FoldedKernels`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Transform, values_per_channel
from bnrestructure.kernels.aten_convolution import convolution_backward
from bnrestructure.kernels.operands import require_fit, require_memory_of_all
from bnrestructure.kernels.rounding import gradient_factor, narrowed

__all__ = ["conv_backward", "conv_forward", "unsupported"]

_LAST = torch.channels_last_3d


def unsupported(sweeps: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why these cannot run ``conv_forward`` or ``conv_backward`` on these arguments, or None."""
    x, transform, weight = args[0:3] if name == "conv_forward" else args[2:5]
    dtype = kwargs["dtype"]
    if transform.gate is not None:
        return "a gate before a kernel of several frames and pixels"
    if weight.numel() == 0 or args[0].numel() == 0:
        return "an empty tensor"
    geometry = args[4] if name == "conv_forward" else args[5]
    if reason := geometry.misfit(x.shape, weight.shape):
        return str(reason)
    if weight.dtype is torch.float64:
        return f"a weight in {weight.dtype}"
    reason: str | None = narrowed(x, transform, dtype)
    if reason is not None:
        return reason
    # x is converted before it is swept: ask about the sizes in the dtype that it will have.
    converted = x if x.dtype == dtype else x.new_empty(1, dtype=dtype).as_strided(x.shape, (0,) * x.dim())
    reason = sweeps.supports("normalise_forward", (converted, transform), {"dtype": dtype})
    return reason


def conv_forward(
    sweeps: Any,
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
    """(y, mean, var) as kernels/reference says; x [N, C_in, T, H, W], the weight [C_out, C_in / groups, kt, kh, kw]."""
    require_fit(x, transform)
    require_memory_of_all((x, weight, bias), x.device.type)
    z = _transformed(sweeps, x.to(dtype), transform)
    bias = None if bias is None else bias.to(dtype)
    y = torch.convolution(z, _weight(weight, dtype), bias, *geometry.aten_arguments)
    y = y.contiguous(memory_format=_LAST) if out is None else out.copy_(y)
    mean, var = sweeps.statistics_forward(y) if statistics else (None, None)
    return y, mean, var


@torch.no_grad()  # under create_graph=True autograd runs backward with gradients on, and would refuse ``out=``
def conv_backward(
    sweeps: Any,
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
) -> ConvGradients:
    """The gradients as kernels/reference says, for a transform without a gate."""
    need_x, need_weight, need_bias = needs
    require_fit(x, transform)
    require_memory_of_all((dy, edge, x, weight), x.device.type)
    p, source = dy.to(dtype), x.to(dtype)
    factor = gradient_factor(edge.a is not None, dtype, torch.float32)
    db = _bias_gradient(sweeps, p, edge).to(dtype) if need_bias else None
    if not (need_x or need_weight):
        return ConvGradients(bias=db)
    d = _output_gradient(sweeps, p, edge, factor).contiguous(memory_format=_LAST)
    # The factor is taken out of the input's gradient by the weight, which only that gradient is made with, if the weight is the smaller.
    by_weight = factor != 1 and weight.numel() < x.numel()
    used = _weight(weight, dtype, 1 / factor if by_weight else 1.0)
    dw = None
    if need_weight:  # before the input's gradient, so that it and z are not in memory at the same time
        _, found = convolution_backward(d, _transformed(sweeps, source, transform), used, geometry, need_input=False, need_weight=True)
        assert found is not None
        dw = _weight_gradient(found, weight, factor)
        del found
    if not need_x:
        return ConvGradients(weight=dw, bias=db)
    g, _ = convolution_backward(d, source, used, geometry, need_input=True, need_weight=False)
    assert g is not None
    del d
    if factor != 1 and not by_weight:
        g.div_(factor)
    if transform.is_identity:
        dx = g.contiguous(memory_format=_LAST).to(x.dtype) if accumulate is None else accumulate.add_(g.to(accumulate.dtype))
        return ConvGradients(dx, weight=dw, bias=db)
    own = accumulate if accumulate is not None and accumulate.dtype == dtype else None
    dx, sum_p, sum_px = sweeps.normalise_backward(g, source, transform, accumulate=own)
    if dx is not accumulate:
        dx = dx.to(x.dtype) if accumulate is None else accumulate.add_(dx.to(accumulate.dtype))
    return ConvGradients(dx, sum_p, sum_px, weight=dw, bias=db)


def _weight(weight: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """In the compute dtype, times ``factor``, and channels_last, so that the result is channels_last, too."""
    if factor == 1:
        return weight.to(dtype).contiguous(memory_format=_LAST)
    made = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=_LAST)
    return torch.mul(weight, factor, out=made)


def _weight_gradient(found: Tensor, weight: Tensor, factor: float) -> Tensor:
    """``found`` without the factor, in the weight's dtype and memory format."""
    if factor == 1 and found.dtype == weight.dtype and found.stride() == weight.stride():
        return found
    # A tensor of one element decides the dtype that is multiplied in, which a number would not.
    return torch.mul(found, torch.full((1,), 1 / factor, device=found.device), out=torch.empty_like(weight))


def _transformed(sweeps: Any, x: Tensor, transform: Transform) -> Tensor:
    """The convolution's real input; x itself where there is nothing to apply."""
    z: Tensor = x if transform.is_identity else sweeps.normalise_forward(x, transform, dtype=x.dtype)
    return z.contiguous(memory_format=_LAST)


def _output_gradient(sweeps: Any, p: Tensor, edge: BackwardEdge, factor: float) -> Tensor:
    """dY times ``factor`` in p's dtype: P and y are the operands of a residual join, s, a and b their batch norms' vectors."""
    if edge.a is None or edge.b is None:
        if edge.s is None:
            return p
        zeros = torch.zeros_like(edge.s)
        scaled: Tensor = sweeps.normalise_forward(p, Transform(zeros, edge.s, zeros), dtype=p.dtype)
        return scaled
    assert edge.y is not None
    zeros = torch.zeros_like(edge.a)
    scale = zeros + factor if edge.s is None else edge.s * factor
    of_p, of_y = Transform(zeros, scale, edge.b * factor), Transform(edge.mean, edge.a * factor, zeros)
    y = edge.y.to(p.dtype)
    d: Tensor = sweeps.residual_forward(p, of_p, y, of_y, "identity", dtype=p.dtype, statistics=False)[0]
    return d


def _bias_gradient(sweeps: Any, p: Tensor, edge: BackwardEdge) -> Tensor:
    """The sum of dY by channel, [C] in fp32, before anything is rounded: behind a batch norm it is zero, and rounding would be all of it.

    ``edge.mean`` is y's own, so the values that a multiplies sum to nothing.
    """
    mean, _ = sweeps.statistics_forward(p)
    scaled = mean if edge.s is None else edge.s * mean
    return (scaled if edge.b is None else scaled + edge.b) * values_per_channel(p)
