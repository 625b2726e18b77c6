"""The convolution node as ATen's product between the sweeps of a device, on images or on videos.

Worth its extra passes over memory where ATen's product is faster by more than they cost, or where a device has no product of its own. The
transformed input and the output gradient live in temporaries, and neither is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.constants import constant
from bnrestructure.core.edges import ConvGradients
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.core.memory_format import in_channels_last
from bnrestructure.kernels.aten_convolution import convolution_backward
from bnrestructure.kernels.calls import (
    ConvBackward,
    ConvForward,
    ConvResult,
    JoinBackward,
    Kernels,
    NormaliseBackward,
    NormaliseForward,
    OutputGradient,
    StatisticsForward,
)
from bnrestructure.kernels.operands import readable, require_fit, weight_of
from bnrestructure.kernels.rounding import gradient_factor

__all__ = ["Hybrid", "weight_gradient"]


class Hybrid:
    """An implementation of the convolution node (kernels/choice.py); ``sweeps`` are the kernels of the tensors' device."""

    finishes_join = True

    def __init__(self, sweeps: Kernels) -> None:
        self._sweeps = sweeps

    def forms_sum(self, node: Any) -> bool:
        """No: its product reads the sum."""
        return False

    def forward(self, call: ConvForward, site: Any = None) -> ConvResult:
        """The result; call.join must be None."""
        dtype = call.dtype
        z = self._transformed(call)
        bias = None if call.bias is None else readable(call.bias, z).to(dtype)
        y = in_channels_last(torch.convolution(z, _weight(call, z), bias, *call.geometry.aten_arguments))
        if not call.statistics:
            return ConvResult(y if call.out is None else call.out.copy_(y), None, None)
        found = self._sweeps.run(StatisticsForward(y, call.out, call.statistics == "unmerged"))
        return ConvResult(y if call.out is None else call.out, *found)

    @torch.no_grad()  # under create_graph=True autograd runs backward with gradients on, and would refuse ``out=``
    def backward(self, call: ConvBackward, site: Any = None) -> ConvGradients:
        """The gradients."""
        x, transform, geometry, dtype = call.x, call.transform, call.geometry, call.dtype
        need_x, need_weight, need_bias = call.needs
        join = call.join if need_x else None
        require_fit(x, transform, *(() if join is None else (join.ty, join.tr)))
        factor = gradient_factor(call.edge.a is not None, dtype, torch.float32)
        d, db = call.dy, None
        if call.edge.s is not None or call.edge.a is not None or need_bias:
            d, db = self._sweeps.run(OutputGradient(d, call.edge, dtype, factor, need_bias))
        d, db = in_channels_last(readable(d, x).to(dtype)), None if db is None else db.to(dtype)
        if not (need_x or need_weight):
            return ConvGradients(bias=db)
        used, dw = _weight(call, d), None
        if need_weight:  # before the input's gradient, so that it and z are not in memory at the same time
            z = self._transformed(call)
            dw = convolution_backward(d, z, used, geometry, need_input=False, need_weight=True)[1]
            del z
        g = None
        if need_x:
            g, _ = convolution_backward(d, x.to(dtype), used, geometry, need_input=True, need_weight=False)
        del d
        return self.finish(call, factor, g, dw, db)

    def finish(self, call: ConvBackward, factor: float, g: Tensor | None, dw: Tensor | None, db: Tensor | None) -> ConvGradients:
        """The gradients, from those at the product's input and of its weight, ``factor`` times too large."""
        x, transform, join = call.x, call.transform, call.join
        dw = None if dw is None else weight_gradient(dw, call.weight, factor)
        if g is None:
            return ConvGradients(weight=dw, bias=db)
        if join is not None:
            found = self._sweeps.run(JoinBackward(g, None, join, x, 1 / factor, call.accumulate))
            return ConvGradients(found.g, found.sum_p, found.sum_py, None, dw, db, found.sum_pr)
        if transform.is_identity and factor == 1:
            dx = in_channels_last(g).to(x.dtype) if call.accumulate is None else call.accumulate.add_(g.to(call.accumulate.dtype))
            return ConvGradients(dx, weight=dw, bias=db)
        dx, sum_p, sum_px, gate = self._sweeps.run(NormaliseBackward(g, x, transform, call.accumulate, 1 / factor))
        return ConvGradients(dx, sum_p, sum_px, gate, dw, db)

    def _transformed(self, call: ConvForward | ConvBackward) -> Tensor:
        """The convolution's real input; x itself where there is nothing to apply."""
        if call.transform.is_identity:
            return in_channels_last(readable(call.x).to(call.dtype))
        return in_channels_last(self._sweeps.run(NormaliseForward(call.x, call.transform, call.dtype)))


def _weight(call: ConvForward | ConvBackward, beside: Tensor) -> Tensor:
    """In the dtype of what it is convolved with, and channels_last, so that the result is channels_last, too."""
    weight = weight_of(call)
    if not weight.is_floating_point():
        raise UnsupportedCallError(f"a weight of {weight.dtype}")
    return in_channels_last(readable(weight, beside).to(beside.dtype))


def weight_gradient(found: Tensor, weight: Tensor, factor: float) -> Tensor:
    """``found`` without the factor, in the weight's dtype and memory format."""
    if factor == 1 and found.dtype == weight.dtype and found.stride() == weight.stride():
        return found
    # A tensor of one element decides the dtype that is multiplied in, which a number would not.
    return torch.mul(found, constant(1 / factor, found.device), out=torch.empty_like(weight))
