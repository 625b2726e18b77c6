"""What every pattern hands back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

__all__ = ["Refusal"]


@dataclass(frozen=True)
class Refusal:
    """A place that a pattern looked at and left alone, and why. Falsy, so that ``if match:`` reads as it should."""

    node: fx.Node
    reason: str

    def __bool__(self) -> bool:
        return False
