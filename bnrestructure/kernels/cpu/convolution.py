"""The convolutions in C++ with everything inside them: prologue, product and epilogue tile by tile, or row by row where depthwise.

Dense ones (src/conv_forward.cpp, conv_backward.cpp), those by Winograd's algorithm (winograd.h), and depthwise ones (depthwise_rows.h) take
the same arguments. What is the same for all calls of a site is written into them once.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from bnrestructure.core.edges import ConvGradients
from bnrestructure.core.records import record
from bnrestructure.kernels.calls import ConvBackward, ConvForward, ConvResult
from bnrestructure.kernels.choice import Node, Site
from bnrestructure.kernels.cpu import memory
from bnrestructure.kernels.cpu.elements import ELEMENT_CODES, activation_code
from bnrestructure.kernels.cpu.library import declare
from bnrestructure.kernels.cpu.memory import Keep
from bnrestructure.kernels.cpu.structures import BackwardArguments, ForwardArguments
from bnrestructure.kernels.layout import pitch_of
from bnrestructure.kernels.operands import reach_of
from bnrestructure.kernels.rounding import gradient_factor

__all__ = ["Fused"]

_byref = ctypes.byref


@record
class _Notes:
    """What calls of one site have in common: arguments without addresses, sizes, and how much of x and of the weight is read."""

    forward: bytes
    backward: bytes
    shape_out: tuple[int, ...]
    x_reach: int
    weight_reach: int
    gradient_factor: float  # where dY has corrections to lose


class Fused:
    """An implementation of the convolution node (kernels/choice.py) by the C++ functions ``bnr_NAME_forward`` and ``bnr_NAME_backward``.

    ``depthwise`` ones read x in its own dtype and know no residual joins; the others read x in the dtype that is computed in.
    """

    def __init__(self, name: str, *, depthwise: bool = False) -> None:
        self._forward, self._backward = declare(f"bnr_{name}_forward"), declare(f"bnr_{name}_backward")
        self._depthwise = depthwise
        self._forms_sum = name == "conv"
        self.finishes_join = not depthwise

    def forms_sum(self, node: Node) -> bool:
        """Where each pixel is in one tile alone: larger kernels would form it again where tiles overlap."""
        return self._forms_sum and node.geometry.is_pointwise(node.weight)

    def forward(self, call: ConvForward, site: Site) -> ConvResult:
        """The result."""
        x, weight, t, dtype, out = call.x, call.weight, call.transform, call.dtype, call.out
        notes = site.notes
        if notes is None:
            notes = site.notes = self._notes(call)
        if not notes.x_reach:
            return self.forward(replace(call, x=self._readable(x, dtype)), Site(site.node, None))
        keep, shape, channels = Keep(), notes.shape_out, x.shape[1]
        a = ForwardArguments.from_buffer_copy(notes.forward)
        a.x, a.weight = memory.span(x, notes.x_reach), memory.span(weight, notes.weight_reach)
        if t.mean is not None:
            a.mean, a.scale, a.beta = memory.vectors(keep, channels, t.mean, t.scale, t.beta)
        if t.gate is not None:
            a.gate = memory.vector(t.gate, keep, shape[0], channels)
        if call.bias is not None:
            a.bias = memory.vector(call.bias, keep, shape[1])
        if call.join is not None:
            a.join = memory.join(call.join, tuple(x.shape), dtype, keep)
        if out is not None and out.dtype is dtype and pitch_of(out):
            y = out
            a.y, a.y_pitch = memory.written(out, shape, dtype)
        else:
            y, a.y, a.y_pitch = memory.fresh_kept(shape, dtype)
        mean = var = None
        if call.statistics:
            mean, a.y_mean = memory.fresh_vector(shape[1])
            var, a.y_var = memory.fresh_vector(shape[1])
        self._forward.call(_byref(a))
        if out is not None and y is not out:
            y = out.copy_(y)
        return ConvResult(y, mean, var)

    def backward(self, call: ConvBackward, site: Site) -> ConvGradients:
        """The gradients."""
        x, weight, t, dtype, edge = call.x, call.weight, call.transform, call.dtype, call.edge
        notes = site.notes
        if notes is None:
            notes = site.notes = self._notes(call)
        if not notes.x_reach:
            return self._converted_backward(call, site)
        need_x, need_weight, need_bias = call.needs
        keep, shape, channels, channels_out = Keep(), notes.shape_out, x.shape[1], weight.shape[0]
        a = BackwardArguments.from_buffer_copy(notes.backward)
        a.x, a.weight = memory.span(x, notes.x_reach), memory.span(weight, notes.weight_reach)
        if t.mean is not None:
            a.mean, a.scale, a.beta = memory.vectors(keep, channels, t.mean, t.scale, t.beta)
        if t.gate is not None:
            a.gate = memory.vector(t.gate, keep, shape[0], channels)
        a.dy, a.dy_pitch = memory.pixels(call.dy, shape, dtype, keep)
        a.gradient_factor = 1.0
        if edge.s is not None:
            a.s = memory.vector(edge.s, keep, channels_out)
        if edge.a is not None and edge.y is not None:
            factors = edge.factors  # alive until the kernel has run
            a.a, a.b, a.y_mean = memory.vectors(keep, channels_out, *factors, edge.mean)
            a.y, a.y_pitch = memory.pixels(edge.y, shape, dtype, keep)
            a.gradient_factor = notes.gradient_factor
        dx = sum_p = sum_px = sum_pr = dgate = dw = db = None
        if need_x:
            dx = self._destination(call, a)
            if call.join is not None:
                a.join = memory.join(call.join, tuple(x.shape), dtype, keep)
                sum_pr, a.sum_pr = memory.fresh_vector(channels)
            if t.gate is not None:
                dgate, a.gate_gradient = memory.fresh_vector(shape[0], channels)
            elif t.mean is not None or call.join is not None:
                sum_p, a.sum_p = memory.fresh_vector(channels)
                sum_px, a.sum_px = memory.fresh_vector(channels)
        if need_weight:
            dw, a.weight_gradient = memory.fresh_like(weight)
            a.weight_gradient_strides = dw.stride()
        if need_bias:
            db, a.bias_gradient = memory.fresh_vector(channels_out)
        self._backward.call(_byref(a))
        if call.join is not None:
            sum_px = sum_px if call.join.ty.gives_sums else None
            sum_pr = sum_pr if call.join.tr.mean is not None else None
        elif dx is not None and call.accumulate is not None and dx is not call.accumulate:
            dx = call.accumulate.add_(dx.to(call.accumulate.dtype))
        if dgate is not None and t.gate is not None:
            dgate = dgate.to(t.gate.dtype)
        return ConvGradients(dx, sum_p, sum_px, dgate, dw, None if db is None else db.to(dtype), sum_pr)

    def _destination(self, call: ConvBackward, a: BackwardArguments) -> Tensor:
        """Where dx is written: what is accumulated to, if it can be added to in place, else fresh memory."""
        x, accumulate = call.x, call.accumulate
        if accumulate is None:
            dx, a.dx, a.dx_pitch = memory.fresh(x.shape, x.dtype)
            return dx
        if accumulate.dtype is x.dtype and pitch_of(accumulate):
            dx = accumulate
        elif call.join is not None:  # the mask comes after the sum
            dx = memory.channels_last(accumulate, x.dtype)
        else:
            dx, a.dx, a.dx_pitch = memory.fresh(x.shape, x.dtype)
            return dx
        a.dx, a.dx_pitch = memory.written(dx, x.shape, x.dtype)
        a.accumulate = 1
        return dx

    def _readable(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of x that the kernel can read."""
        return memory.channels_last(x, x.dtype if self._depthwise else dtype)

    def _converted_backward(self, call: ConvBackward, site: Site) -> ConvGradients:
        """The gradients at a copy of x that the kernel can read, in x's own dtype."""
        x, accumulate = self._readable(call.x, call.dtype), call.accumulate
        own = accumulate if accumulate is not None and accumulate.dtype is x.dtype else None
        found = self.backward(replace(call, x=x, accumulate=own), Site(site.node, None))
        if found.dx is None or (own is not None and found.dx is own):
            return found
        if accumulate is None or call.join is not None:
            return found._replace(dx=found.dx.to(call.x.dtype))
        return found._replace(dx=accumulate.add_(found.dx.to(accumulate.dtype)))

    def _notes(self, call: ConvForward | ConvBackward) -> _Notes:
        """What all calls of this site have in common; an x_reach of 0 where x must be copied first."""
        x, weight, geometry, dtype = call.x, call.weight, call.geometry, call.dtype
        size = geometry.output_size(x.shape[2:], weight.shape[2:])
        shape_out = (x.shape[0], weight.shape[0], *size)
        pitch = pitch_of(x) if self._depthwise or x.dtype is dtype else 0
        if not pitch:
            return _Notes(b"", b"", shape_out, 0, 0, 1.0)
        forward, backward = ForwardArguments(), BackwardArguments()
        for a in (forward, backward):
            a.batch, a.in_channels, a.in_height, a.in_width = x.shape
            _, a.out_channels, a.out_height, a.out_width = shape_out
            a.kernel_h, a.kernel_w = weight.shape[2:]
            a.stride_h, a.stride_w = geometry.stride
            a.padding_h, a.padding_w = geometry.padding
            a.dilation_h, a.dilation_w = geometry.dilation
            a.groups = geometry.groups
            a.x_element, a.y_element, a.weight_element = (ELEMENT_CODES[d] for d in (x.dtype, dtype, weight.dtype))
            a.threads = torch.get_num_threads()
            a.activation, a.slope = activation_code(call.transform.act)
            a.weight_strides = weight.stride()
            a.x_pitch = pitch
        n, c, h, w = x.shape
        factor = gradient_factor(not self._depthwise, dtype, torch.float32)
        return _Notes(bytes(forward), bytes(backward), shape_out, (n * h * w - 1) * pitch + c, reach_of(weight), factor)
