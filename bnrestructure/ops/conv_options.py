"""What the convolution nodes share: their options, where their results go, and the backward edge of what they made."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, statistics_count, statistics_factors
from bnrestructure.kernels.unmerged import Wanted
from bnrestructure.ops.slots import Slot, Written, opened

__all__ = ["ConvOptions", "Shortcut", "backward_edge", "check_shapes", "destination"]


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
    statistics: Wanted
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
    size = options.geometry.output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
    slot = Slot(into, options.offset, options.channels, options.visible)
    return opened(slot, (x.shape[0], weight.shape[0], *size), options.dtype, x.device)


def backward_edge(dgain: Any, dmean: Any, dvar: Any, y: Any, ymean: Any) -> BackwardEdge:
    """The backward edge of y, from the gradients of its gain and of its statistics."""
    if dmean is None and dvar is None:
        return BackwardEdge(s=dgain)
    if dmean is None or dvar is None:
        return BackwardEdge(dgain, *statistics_factors(y, ymean, dmean, dvar), y, ymean)
    return BackwardEdge(dgain, dvar, dmean, y, ymean, statistics_count(y))


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
