"""Telling whoever watches how far a long piece of work is. Nobody does, unless a command line asked to (``listening``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["expect", "listening", "tell"]

_listener: ContextVar[tuple[Callable[[str], None], Callable[[int], None]] | None] = ContextVar("_listener", default=None)


@contextmanager
def listening(tell: Callable[[str], None], expect: Callable[[int], None]) -> Iterator[None]:
    """Within the block ``tell`` is called with a few words as each step begins, ``expect`` with the number of steps to come."""
    token = _listener.set((tell, expect))
    try:
        yield
    finally:
        _listener.reset(token)


def tell(words: str) -> None:
    """A step begins."""
    if (listener := _listener.get()) is not None:
        listener[0](words)


def expect(more: int) -> None:
    """So many steps are to come."""
    if (listener := _listener.get()) is not None:
        listener[1](more)
