"""When to stop capturing a region again: what torch.compile calls its recompile limit.

A capture costs about a training step. An attribute that is another one in each call, a mask that is drawn anew, would have every step
capture, and no program run twice. The part that reads it runs as it was then, and the parts inside of it are regions of their own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["Recaptures"]

#: So many captures in a row, none of whose programs a later call used.
_IN_VAIN = 8
#: After so many calls as it was one more capture is tried; twice as many after each that was in vain, too.
_CALLS_BEFORE_ANOTHER = 64


class Recaptures:
    """By the structure of calls: whether attributes stay what they are from one call to the next."""

    def __init__(self) -> None:
        self._in_vain: Counter[Any] = Counter()
        self._left: dict[Any, int] = {}
        self._calls: dict[Any, int] = {}

    def used(self, key: Any) -> None:
        """A program that was there fits a call of this structure."""
        if key in self._in_vain:
            for counts in (self._in_vain, self._left, self._calls):
                counts.pop(key, None)

    def worth_another(self, key: Any) -> bool:
        """An attribute has changed, and no program fits: whether to capture again."""
        if self._in_vain[key] < _IN_VAIN:
            self._in_vain[key] += 1
            return True
        left = self._left.get(key, _CALLS_BEFORE_ANOTHER)
        if left:
            self._left[key] = left - 1
            return False
        self._left[key] = self._calls[key] = 2 * self._calls.get(key, _CALLS_BEFORE_ANOTHER)
        return True
