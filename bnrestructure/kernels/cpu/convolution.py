"""The dense fused convolution on CPU: 2-D, channels_last, float32 and bfloat16.

:func:`conv_forward` and :func:`conv_backward` mean what their namesakes in kernels/reference mean; for each node they
run the implementation that convolution_choice.py expects to be the faster one. Tensors of another layout are copied to
channels_last first: correct, and slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.kernels.cpu import convolution_fused, convolution_hybrid, layout, library
from bnrestructure.kernels.cpu.convolution_choice import Choice, Node, choose
from bnrestructure.ops.edges import BackwardEdge, ConvGeometry, ConvGradients, Transform

__all__ = ["choice", "conv_backward", "conv_forward", "supports"]

_IMPLEMENTATIONS = {"fused": convolution_fused, "hybrid": convolution_hybrid}


def supports(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why these kernels cannot run ``conv_forward`` or ``conv_backward`` on these arguments, or None."""
    x, transform, weight = args[0:3] if name == "conv_forward" else args[2:5]
    if weight.dim() != 4:
        return f"{weight.dim() - 2}-D convolution"
    for what, dtype in (("compute dtype", kwargs["dtype"]), ("input", x.dtype), ("weight", weight.dtype)):
        if dtype not in layout.ELEMENT_CODES:
            return f"{what} is {dtype}"
    if x.numel() == 0 or weight.numel() == 0 or args[0].numel() == 0:
        return "an empty tensor"
    return layout.unsupported_activation(transform.act)


def choice(
    x: Tensor, transform: Transform, weight: Tensor, geometry: ConvGeometry, dtype: torch.dtype, direction: str
) -> Choice:
    """Which implementation runs this node in ``direction`` ("forward" or "backward"), and why."""
    n, c, h, w = x.shape
    out, _, *kernel = weight.shape
    size_out = geometry.output_size((h, w), tuple(kernel))
    node = Node(n, c, (h, w), out, size_out, tuple(kernel), geometry, not transform.is_identity)
    return choose(node, dtype, direction, library.isa_name())


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
    chosen = choice(x, transform, weight, geometry, dtype, "forward").implementation
    run = _IMPLEMENTATIONS[chosen].conv_forward
    return run(x, transform, weight, bias, geometry, dtype=dtype, statistics=statistics, out=out)


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
) -> ConvGradients:
    """The gradients as kernels/reference says; dy, x and the weight are float32 or bfloat16."""
    chosen = choice(x, transform, weight, geometry, dtype, "backward").implementation
    run = _IMPLEMENTATIONS[chosen].conv_backward
    return run(dy, edge, x, transform, weight, geometry, dtype=dtype, needs=needs, accumulate=accumulate)
