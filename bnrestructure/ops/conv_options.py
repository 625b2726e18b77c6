"""What the convolution nodes share: their options, where their results go, and the backward edge of what they made."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.aliases import channel_slice
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, statistics_factors
from bnrestructure.core.kept import kept_activation

__all__ = ["ConvOptions", "Shortcut", "Slot", "Written", "backward_edge", "check_shapes", "destination", "incoming_gradient"]


class Slot(NamedTuple):
    """Where in a concat's buffer a node writes its y: as channels ``[offset, offset + C_out)``.

    into      the buffer, or None for a new one of ``channels`` channels
    offset    None appends: y comes right behind the channels of ``into``, and is returned together with them
    visible   how many channels of the buffer are returned; None: those of ``into``
    """

    into: Tensor | None = None
    offset: int | None = 0
    channels: int | None = None
    visible: int | None = None


class Shortcut(NamedTuple):
    """What a residual join adds: r, of x's shape, as it is or normalised by vectors [C_in] of its own.

    ``x_gain`` and ``r_gain`` are what ``ops.residual`` calls gain and r_gain.
    """

    r: Tensor
    r_mean: Tensor | None = None
    r_scale: Tensor | None = None
    r_beta: Tensor | None = None
    x_gain: Tensor | None = None
    r_gain: Tensor | None = None


class ConvOptions(NamedTuple):
    """The arguments of ``ops.conv`` that are not tensors, as an autograd.Function takes them."""

    act: str
    geometry: ConvGeometry
    statistics: bool
    chain: bool
    gain: bool
    offset: int | None
    channels: int | None
    visible: int | None
    dtype: torch.dtype
    backend: str


def destination(
    x: Tensor, weight: Tensor, into: Tensor | None, options: ConvOptions
) -> tuple[Tensor, Tensor, Written] | tuple[None, None, None]:
    """(the concat buffer to return, the slice of it to write, what backward must know of that) where y goes into one.

    Raises RuntimeError, in the words of PyTorch's convolution, where x and the weight do not fit each other.
    """
    if into is None and options.channels is None:
        return None, None, None
    check_shapes(x, weight, options.geometry)
    out_channels, before = weight.shape[0], None if into is None else into.shape[1]
    if into is None:
        size = options.geometry.output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
        into = kept_activation((x.shape[0], options.channels or 0, *size), options.dtype, x.device)
    if options.offset is None:
        offset, visible = into.shape[1], into.shape[1] + out_channels
    else:
        offset, visible = options.offset, into.shape[1] if options.visible is None else options.visible
    return channel_slice(into, 0, visible), channel_slice(into, offset, out_channels), Written(before, offset, out_channels)


def backward_edge(dgain: Any, dmean: Any, dvar: Any, y: Any, ymean: Any) -> BackwardEdge:
    """The backward edge of y, from the gradients of its gain and of its statistics."""
    if dmean is None and dvar is None:
        return BackwardEdge(s=dgain)
    a, b = statistics_factors(y, ymean, dmean, dvar)
    return BackwardEdge(s=dgain, a=a, b=b, y=y, mean=ymean)


class Written(NamedTuple):
    """Where in a concat buffer y was written: the channels of the one it was given, or None for a new one; y's first one, and how many."""

    into_channels: int | None
    offset: int
    channels: int


def incoming_gradient(written: Written, dresult: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the gradient at what the convolution wrote, the rest for the buffer it wrote into) from that of what the node returned."""
    dinto = None if written.into_channels is None else dresult.narrow(1, 0, written.into_channels)
    return dresult.narrow(1, written.offset, written.channels), dinto


def check_shapes(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> None:
    """Raise RuntimeError, in the words of PyTorch's convolution, where these do not fit each other."""
    spatial = len(geometry.stride)
    if x.dim() != spatial + 2:
        raise RuntimeError(
            f"Expected {spatial + 2}D input [N, C, *spatial] to a {spatial}-D convolution, but got input of size: {list(x.shape)}"
        )
    expected = weight.shape[1] * geometry.groups
    if x.shape[1] != expected:
        raise RuntimeError(
            f"Given groups={geometry.groups}, weight of size {list(weight.shape)}, expected input{list(x.shape)} "
            f"to have {expected} channels, but got {x.shape[1]} channels instead"
        )
    if min(geometry.output_size(x.shape[2:], weight.shape[2:])) < 1:
        raise RuntimeError(
            f"Calculated output size is too small for input {list(x.shape)} and kernel {list(weight.shape[2:])}: "
            "kernel size can't be greater than actual input size"
        )
