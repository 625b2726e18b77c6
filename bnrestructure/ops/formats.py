"""Memory formats where a region's tensors meet code that is not ours: the user's modules and callers see what eager would give them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bnrestructure.core.memory_format import is_channels_last

__all__ = ["EagerFormats", "eager_format", "eager_formats"]


class EagerFormats(NamedTuple):
    """Of 4 and 5 dimensions, those of the tensors that eager would have in channels_last; and whether any fused node is of 1-D data."""

    channels_last: frozenset[int]
    fused_1d: bool


def eager_formats(arguments: tuple[object, ...], weights: tuple[object, ...], fused_1d: bool) -> EagerFormats:
    """How eager convolutions lay out their results in a call with these arguments and convolution weights.

    In channels_last where an argument or a weight of as many dimensions is laid out so; and where anything is, if no argument has as
    many: frames are made of a video. Sizes are arguments as well in the graphs that Dynamo makes.
    """
    last = {t.dim() for t in (*arguments, *weights) if is_channels_last(t)}
    given = {t.dim() for t in arguments if isinstance(t, Tensor)}
    return EagerFormats(frozenset(d for d in (4, 5) if d in last or (last and d not in given)), fused_1d)


def eager_format(x: object, formats: EagerFormats) -> object:
    """``x`` contiguous, unless tensors of its dimensions are channels_last (or x is no tensor). Eager knows no such format of 1-D data."""
    if not isinstance(x, Tensor):
        return x
    last = formats.channels_last
    kept = x.dim() in last if x.dim() in (4, 5) else last and not (formats.fused_1d and x.dim() == 3)
    return x if kept else x.contiguous()
