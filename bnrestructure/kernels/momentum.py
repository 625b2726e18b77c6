"""How much of a batch goes into a layer's running statistics, where the host knows it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["counted"]


def counted(batches: Tensor | None, momentum: float | None) -> float:
    """The batch's share, once it is counted: the momentum; without one, where all batches have equal shares, the counter is read."""
    if batches is not None:
        batches.add_(1)
    if momentum is None:
        return 0.0 if batches is None else 1.0 / float(batches)
    return momentum
