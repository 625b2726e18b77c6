"""When to stop capturing a region again: what torch.compile calls its recompile limit.

A capture costs about a training step. Where an attribute is another one in each call, a factor that follows a schedule, every step would
capture, and no program would run twice. The part that reads it runs as it was then; the parts inside of it are regions of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Recaptures"]

#: So many captures in a row, behind the first one, none of whose programs a later call used.
_IN_VAIN = 8
#: After so many calls as it was one more capture is tried; twice as many after each that was in vain, too.
_CALLS_BEFORE_ANOTHER = 64


@dataclass
class _InVain:
    """Of calls of one structure: captures in vain, and the calls until the next one, of ``pause``."""

    captures: int = 0
    left: int = _CALLS_BEFORE_ANOTHER
    pause: int = _CALLS_BEFORE_ANOTHER


class Recaptures:
    """By the structure of calls: whether attributes stay what they are from one call to the next."""

    def __init__(self) -> None:
        self._in_vain: dict[Any, _InVain] = {}

    def used(self, *keys: Any) -> None:
        """A program that was there fits a call of these structures."""
        if self._in_vain:  # rarely: a structure takes long to hash, and this is asked in each step
            for key in keys:
                self._in_vain.pop(key, None)

    def worth_another(self, key: Any) -> bool:
        """An attribute has changed, and no program fits: whether to capture again."""
        found = self._in_vain.setdefault(key, _InVain())
        if found.captures < _IN_VAIN:
            found.captures += 1
            return True
        if found.left:
            found.left -= 1
            return False
        found.pause *= 2
        found.left = found.pause
        return True
