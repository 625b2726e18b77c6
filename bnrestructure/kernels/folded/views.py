"""Activations of any number of spatial dimensions as images, without moving them.

Between fused nodes an activation [N, C, *spatial] lies in the order N, *spatial, C. Neighbouring dimensions of that order can be taken
for one, so a video is an image to whoever is told the right two sizes; kernels keep to 4-D tensors and this is where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor

from bnrestructure.core.aliases import alias
from bnrestructure.kernels.operands import readable

__all__ = ["Fold", "View", "delivered", "folded", "frames", "image", "lines", "stand_in", "unfolded"]

#: From the sizes of an activation [N, C, *spatial] to those of the 4-D tensor that it is taken for.
Fold = Callable[[Sequence[int]], tuple[int, int, int, int]]
#: :func:`folded`, or :func:`stand_in`.
View = Callable[[Tensor, Fold], Tensor]


def image(sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """[N, C, *spatial] as [N, C, all but the last spatial dimension, the last one]: images stay apart. [N, C] has one pixel."""
    n, c, *spatial = sizes
    return n, c, prod(spatial[:-1]), spatial[-1] if spatial else 1


def frames(sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """[N, C, T, H, W] as [N * T, C, H, W]."""
    n, c, t, h, w = sizes
    return n * t, c, h, w


def lines(sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """[N, C, T, H, W] as [N, C, T, H * W]: a frame is a row."""
    n, c, t, h, w = sizes
    return n, c, t, h * w


def folded(x: Tensor, fold: Fold) -> Tensor:
    """x as the 4-D tensor of ``fold``: a view where x's strides allow it (also as a channel slice of a wider buffer), else a copy."""
    n, c, h, w = fold(x.shape)
    return readable(x).movedim(1, -1).reshape(n, h, w, c).movedim(-1, 1)


def stand_in(x: Tensor, fold: Fold) -> Tensor:
    """What :func:`folded` would give, for questions about its sizes, dtype and device: none of its elements may be read."""
    return x.as_strided(fold(x.shape), (0, 0, 0, 0))


def unfolded(y: Tensor, sizes: Sequence[int]) -> Tensor:
    """A folded result back in ``sizes``: a fresh tensor over y's memory, for autograd forbids to write to a view that a node returned."""
    n, c, *spatial = sizes
    return alias(y.movedim(1, -1).reshape(n, *spatial, c).movedim(-1, 1))


def delivered(result: Tensor, into: Tensor) -> Tensor:
    """``into``, which a kernel was given folded and returned as ``result``; where the fold was a copy, that is copied back."""
    if result.data_ptr() != into.data_ptr():
        into.copy_(unfolded(result, into.shape))
    return into
