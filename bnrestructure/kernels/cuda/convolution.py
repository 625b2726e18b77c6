"""The convolution node on CUDA: for each node the implementation that convolution_choice.py names, or that was measured.

While bnrestructure.tune is measuring, the candidates are timed on the node's own arguments first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.kernels import reference, tuning
from bnrestructure.kernels.cuda import convolution_fused, convolution_hybrid, device
from bnrestructure.kernels.cuda.convolution_choice import BACKWARD, Node, call_of, candidates, choose, forms_sum, node_of
from bnrestructure.kernels.cuda.residual import residual_backward, residual_forward
from bnrestructure.kernels.join import join_backward

__all__ = ["conv_backward", "conv_forward"]

_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "fused": convolution_fused,
    "depthwise": convolution_fused,
    "hybrid": convolution_hybrid,
    "reference": reference,
}
#: The dgrads that finish a residual join's gradient themselves.
_FINISHING = ("fused", "hybrid")


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
    join: Join | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var): see kernels/reference/convolution.py. x [N, C_in, H, W] of any strides; fp32, bf16 or fp16.

    With ``join`` x, channels_last in ``dtype``, is written first: the join's sum.
    """
    node = _node(x, transform, weight, geometry, dtype, join)

    def run(implementation: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        options: dict[str, Any] = {"dtype": dtype, "statistics": statistics, "out": out}
        if join is not None and implementation == "fused" and forms_sum(node):
            options["join"] = join
        elif join is not None:
            residual_forward(*join.operands, dtype=dtype, statistics=False, into=x)
        return _IMPLEMENTATIONS[implementation].conv_forward(x, transform, weight, bias, geometry, **options)

    if tuning.is_measuring():
        _measure_once(node, "forward", x, run)
    return run(choose(node, "forward", device.gpu_of(x)).implementation)


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
    """Gradients of :func:`conv_forward`: see kernels/reference/convolution.py. With ``join``, whose sum x is, dx is G of that join."""

    def run(name: str, into: Tensor | None) -> ConvGradients:
        dgrad, wgrad = BACKWARD[name]
        if join is not None and dgrad not in _FINISHING:
            kernel = _IMPLEMENTATIONS[dgrad].conv_backward
            return _in_turn(kernel, dy, edge, x, join, weight, geometry, needs=needs[1:], dtype=dtype, accumulate=into)
        parts = [(dgrad, needs, into)]
        if dgrad != wgrad:
            parts = [(wgrad, (False, needs[1], needs[2]), None), (dgrad, (needs[0], False, False), into)]
        merged = ConvGradients()
        for implementation, part, to in parts:
            if any(part):
                kernel = _IMPLEMENTATIONS[implementation].conv_backward
                options: dict[str, Any] = {"join": join} if join is not None and part[0] else {}
                found = kernel(dy, edge, x, transform, weight, geometry, dtype=dtype, needs=part, accumulate=to, **options)
                merged = merged._replace(**{key: value for key, value in found._asdict().items() if value is not None})
        return merged

    node = _node(x, transform, weight, geometry, dtype, join)
    if tuning.is_measuring() and needs[0] and needs[1]:
        # A tensor to add to that many times, with the strides of the real one and nobody's gradient.
        into = None if accumulate is None else torch.empty_like(accumulate).copy_(accumulate)
        _measure_once(node, "backward", x, partial(run, into=into))
    return run(choose(node, "backward", device.gpu_of(x)).implementation, accumulate)


def _in_turn(
    kernel: Callable[..., ConvGradients],
    dy: Tensor,
    edge: BackwardEdge,
    z: Tensor,
    join: Join,
    weight: Tensor,
    geometry: ConvGeometry,
    **options: Any,
) -> ConvGradients:
    """The convolution's gradients by a ``conv_backward`` that knows no joins, then the join's own sweep."""
    kernels = SimpleNamespace(conv_backward=kernel, residual_backward=residual_backward)
    g, sum_p, sum_py, sum_pr, dw, db = join_backward(kernels, dy, edge, z, join, weight, geometry, **options)
    return ConvGradients(g, sum_p, sum_py, None, dw, db, sum_pr)


def _node(
    x: Tensor, transform: Transform, weight: Tensor, geometry: ConvGeometry, dtype: torch.dtype, join: Join | None
) -> Node:
    gated, tf32 = transform.gate is not None, device.uses_tf32()
    shapes = tuple(x.shape), tuple(weight.shape)
    return node_of(*shapes, geometry, not transform.is_identity, gated, dtype, tf32, join is not None)


def _measure_once(node: Node, direction: str, x: Tensor, run: Callable[[str], object]) -> None:
    """Time the candidates on these very arguments, unless nodes of this size were timed on this GPU before."""
    device.identify_machine(device.gpu_of(x))
    call = call_of(node, direction)
    if tuning.measured(call) is None:
        timer = device.event_timer(x.device) if x.is_cuda else tuning.wall_clock
        tuning.measure(call, {name: partial(run, name) for name in candidates(node, direction)}, timer)
        choose.cache_clear()
