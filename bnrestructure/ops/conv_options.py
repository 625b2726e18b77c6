"""What the convolution nodes share: their options, where their results go, and the backward edge of what they made."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.aliases import channel_slice
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, statistics_factors
from bnrestructure.core.kept import kept_activation

__all__ = ["ConvOptions", "backward_edge", "destination", "incoming_gradient", "remember"]


class ConvOptions(NamedTuple):
    """The arguments of ``ops.conv`` that are not tensors, as an autograd.Function takes them."""

    act: str
    geometry: ConvGeometry
    statistics: bool
    thread: bool
    gain: bool
    offset: int | None
    channels: int | None
    visible: int | None
    dtype: torch.dtype
    backend: str


def destination(
    x: Tensor, weight: Tensor, into: Tensor | None, options: ConvOptions
) -> tuple[Tensor | None, Tensor | None, int]:
    """(the buffer to return, the slice of it to write, its first channel); (None, None, 0) when y is a tensor of its own."""
    if into is None and options.channels is None:
        return None, None, 0
    out_channels = weight.shape[0]
    if into is None:
        size = options.geometry.output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
        into = kept_activation((x.shape[0], options.channels or 0, *size), options.dtype, x.device)
    if options.offset is None:
        offset, visible = into.shape[1], into.shape[1] + out_channels
    else:
        offset, visible = options.offset, into.shape[1] if options.visible is None else options.visible
    return channel_slice(into, 0, visible), channel_slice(into, offset, out_channels), offset


def backward_edge(dgain: Any, dmean: Any, dvar: Any, y: Any, ymean: Any) -> BackwardEdge:
    """The backward edge of y, from the gradients of its gain and of its statistics."""
    if dmean is None and dvar is None:
        return BackwardEdge(s=dgain)
    a, b = statistics_factors(y, ymean, dmean, dvar)
    return BackwardEdge(s=dgain, a=a, b=b, y=y, mean=ymean)


def remember(ctx: Any, options: ConvOptions, weight: Tensor, bias: Tensor | None, into: Tensor | None, offset: int) -> None:
    """What :func:`incoming_gradient` and the nodes' backward need to know beside their tensors."""
    ctx.options = options
    ctx.has_bias = bias is not None
    ctx.into_channels = None if into is None else into.shape[1]
    ctx.offset, ctx.out_channels = offset, weight.shape[0]


def incoming_gradient(ctx: Any, dresult: Any) -> tuple[Any, Any]:
    """(the gradient at what the convolution wrote, the rest for the buffer it wrote into) from that of what the node returned."""
    if dresult is None or (ctx.options.channels is None and ctx.into_channels is None):
        return dresult, None
    dinto = None if ctx.into_channels is None else dresult.narrow(1, 0, ctx.into_channels)
    return dresult.narrow(1, ctx.offset, ctx.out_channels), dinto
