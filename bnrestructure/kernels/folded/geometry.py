"""Which 2-D convolution of which images a 1-D or 3-D convolution is, if it is one.

    1-D                        kernel (1, k) over images of one row
    kernel (1, kh, kw)         over frames; with a stride in time over every so many of them
    kernel (kt, 1, 1)          kernel (kt, 1) over images whose rows are whole frames

Anything else is no 2-D convolution: kernels/hybrid.py runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, Transform
from bnrestructure.kernels.folded.views import Fold, frames, image, lines

__all__ = ["Folding", "folding_of"]


class Folding(NamedTuple):
    """``fold`` takes x and y for images; ``kernel`` and ``geometry`` are the 2-D convolution's; ``step``: every so many frames are read."""

    fold: Fold
    kernel: tuple[int, int]
    geometry: ConvGeometry
    step: int = 1

    def read(self, x: Tensor) -> Tensor:
        """The frames of x that the convolution reads: x itself, or a view of it."""
        return x if self.step == 1 else x[:, :, :: self.step]

    def weight(self, weight: Tensor) -> Tensor:
        """[C_out, C_in / groups, *kernel] with the 2-D kernel: a view."""
        return weight.view(*weight.shape[:2], *self.kernel)

    def sizes(self, x: Sequence[int]) -> tuple[int, int, int, int]:
        """Of the images that are read of an input of sizes ``x``."""
        return self.fold(x if self.step == 1 else (*x[:2], -(-x[2] // self.step), *x[3:]))

    def transform(self, transform: Transform, x: Sequence[int]) -> Transform:
        """The transform of the images of an x of these sizes: each has a gate of its own."""
        images = self.sizes(x)[0]
        gate = transform.gate
        if gate is None or images == x[0]:
            return transform
        each = gate.unsqueeze(1).expand(-1, images // max(x[0], 1), -1)
        return transform._replace(gate=each.reshape(images, gate.shape[1]))


@lru_cache(maxsize=1024)
def folding_of(kernel: tuple[int, ...], geometry: ConvGeometry) -> Folding | None:
    """How a convolution of this kernel is one over images, or None where it is not."""
    stride, padding, dilation, groups = geometry
    if len(kernel) == 1:
        return Folding(image, (1, *kernel), ConvGeometry((1, *stride), (0, *padding), (1, *dilation), groups))
    if len(kernel) != 3:
        return None
    if kernel[0] == 1 and padding[0] == 0:
        return Folding(frames, kernel[1:], ConvGeometry(stride[1:], padding[1:], dilation[1:], groups), stride[0])
    if kernel[1:] == (1, 1) and stride[1:] == (1, 1) and padding[1:] == (0, 0):
        return Folding(lines, (kernel[0], 1), ConvGeometry((stride[0], 1), (padding[0], 0), (dilation[0], 1), groups))
    return None
