"""The implementations of one convolution node beside each other: which of them are right, and which of those is the fastest."""

from __future__ import annotations

from bnrestructure.kernels import tuning
from bnrestructure.kernels.choice import Alternatives

__all__ = ["Comparison"]


class Comparison:
    """What is known of a node's implementations. Nothing is decided where a process had too little memory for one of them."""

    def __init__(self, of: Alternatives) -> None:
        self.node = of.node
        # The chosen one first: others must be clearly faster.
        self._names = sorted(of.names, key=lambda name: name != of.chosen)
        self._faults: dict[str, str | None] = {}
        self._passing = False

    def tell(self, name: str, fault: str | None, *, passing: bool = False) -> None:
        """What is wrong with an implementation, if anything is; ``passing``: it may be found otherwise another time."""
        self._faults[name] = fault
        self._passing = self._passing or passing

    @property
    def ready(self) -> bool:
        """Whether all of them are known to be right or wrong."""
        return len(self._faults) == len(self._names)

    @property
    def right(self) -> list[str]:
        """Those that are right, the chosen one first."""
        return [name for name in self._names if self._faults[name] is None]

    def measurement(self, milliseconds: dict[str, float]) -> tuning.Measurement | None:
        """What to choose by; ``milliseconds`` of those that were timed. None where that is not known."""
        right, wrong = self.right, {name: fault for name, fault in self._faults.items() if fault is not None}
        if self._passing or not right or (len(right) > 1 and right[0] not in milliseconds):
            return None
        if len(right) == 1:
            return tuning.Measurement(self.node, right[0], {}, wrong)
        return tuning.decided(self.node, {name: milliseconds[name] for name in right if name in milliseconds}, wrong)
