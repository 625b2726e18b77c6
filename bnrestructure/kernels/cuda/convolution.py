"""The convolution fused whole: prologue, product and epilogue in one kernel each way; dense or depthwise."""

from __future__ import annotations

from typing import Any

from bnrestructure.core.edges import ConvGradients
from bnrestructure.kernels.calls import ConvBackward, ConvForward, ConvResult
from bnrestructure.kernels.choice import Node
from bnrestructure.kernels.cuda import dense_dgrad, dense_forward, dense_wgrad, depthwise_dgrad, depthwise_forward, depthwise_wgrad
from bnrestructure.kernels.cuda.edges import edge_pixels
from bnrestructure.kernels.cuda.rule import forms_sum
from bnrestructure.kernels.cuda.sums import Sums
from bnrestructure.kernels.operands import weight_of

__all__ = ["Dense", "Depthwise"]


class Dense:
    """An implementation of the convolution node (kernels/choice.py); fp32, bf16 or fp16."""

    finishes_join = True

    def forms_sum(self, node: Node) -> bool:
        """Where each pixel is read by one row of tiles alone."""
        return forms_sum(node)

    def forward(self, call: ConvForward, site: Any = None) -> ConvResult:
        """The result; with a join its sum is formed in the prologue."""
        found = dense_forward.conv_forward(
            call.x, call.transform, weight_of(call), call.bias, call.geometry,
            dtype=call.dtype, statistics=call.statistics, out=call.out, join=call.join,
        )  # fmt: skip
        return ConvResult(*found)

    def backward(self, call: ConvBackward, site: Any = None) -> ConvGradients:
        """The gradients."""
        return _gradients(call, dense_dgrad.dgrad, dense_wgrad.wgrad, {"join": call.join})


class Depthwise:
    """The same for depthwise convolutions, which know no joins."""

    finishes_join = False

    def forms_sum(self, node: Node) -> bool:
        """No."""
        return False

    def forward(self, call: ConvForward, site: Any = None) -> ConvResult:
        """The result."""
        found = depthwise_forward.conv_forward(
            call.x, call.transform, weight_of(call), call.bias, call.geometry, dtype=call.dtype, statistics=call.statistics, out=call.out
        )
        return ConvResult(*found)

    def backward(self, call: ConvBackward, site: Any = None) -> ConvGradients:
        """The gradients."""
        return _gradients(call, depthwise_dgrad.dgrad, depthwise_wgrad.wgrad, {})


def _gradients(call: ConvBackward, dgrad: Any, wgrad: Any, options: dict[str, Any]) -> ConvGradients:
    need_x, need_weight, need_bias = call.needs
    gradient, sums = edge_pixels(call.dy, call.edge), Sums()
    dw = db = None
    if need_weight or need_bias:
        of = call.x, call.transform, call.weight, call.geometry
        dw, db = wgrad(gradient, *of, dtype=call.dtype, needs_bias=need_bias, sums=sums)
    if not need_x:
        sums.finish()
        return ConvGradients(weight=dw if need_weight else None, bias=db)
    of = call.x, call.transform, weight_of(call), call.geometry
    found = dgrad(gradient, *of, dtype=call.dtype, sums=sums, accumulate=call.accumulate, **options)
    sums.finish()
    return ConvGradients(found.dx, found.sum_p, found.sum_px, found.gate, dw if need_weight else None, db, found.sum_pr)
