"""Batch statistics as tiles have found them: what merges them need not be a step of its own."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Mean", "Unmerged", "Wanted", "merged"]


class Unmerged(NamedTuple):
    """Batch statistics in the place of a mean and a variance.

    ``partial`` [3, tiles, C] is a tile's mean, what rounding left out of it, and its sum of centred squares. A tile has ``counts`` [tiles]
    rows, or, without them, ``unit`` of all ``rows``, the last one fewer.
    """

    partial: Tensor
    rows: int = 0
    unit: int = 1
    counts: Tensor | None = None


#: What stands for a mean in a result: a Tensor [C], an Unmerged where the call allows it, or None without statistics.
Mean = Any

#: Whether statistics are wanted, and if so whether they may be an :class:`Unmerged`.
Wanted = bool | Literal["unmerged"]


def merged(found: Unmerged) -> tuple[Tensor, Tensor]:
    """(mean, biased variance), each [C], by Chan's formula.

    Means are taken from the first tile's on: the differences are exact where the means agree in their leading digits.
    """
    means, remainders, m2 = found.partial.unbind()
    if found.counts is None:
        left = found.rows - found.unit * torch.arange(means.shape[0], device=means.device)
        counts = left.clamp(0, found.unit).to(means.dtype)[:, None]
    else:
        counts = found.counts[:, None]
    shifts = (means - means[0]) + remainders
    total = counts.sum()
    shift = (counts * shifts).sum(0) / total
    return means[0] + shift, (m2 + counts * (shifts - shift).square()).sum(0) / total
