"""How the tests of rounding measure whether small corrections of a gradient survived: by their sums over each channel."""

from __future__ import annotations

from torch import Tensor


def total(x: Tensor) -> Tensor:
    """The sum of x [N, C, H, W] over all but the channels, in fp64."""
    return x.double().sum((0, 2, 3))


def kept(found: Tensor, before: Tensor, wanted: Tensor) -> float:
    """How much of the wanted change was made, on average: 1 for all of it."""
    change = wanted - before
    return ((found - before) @ change / (change @ change)).item()
