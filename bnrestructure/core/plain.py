"""Numbers and strings that code can be generated of: graphs are, and of a value they hold its ``repr``."""

from __future__ import annotations

from typing import Any

__all__ = ["plain"]

_KINDS: tuple[Any, ...] = (bool, int, float, complex, str)  # a bool is an int, too


def plain(value: Any) -> Any:
    """The Python number or string for one of a subclass or of numpy's; any other value as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 and hasattr(value, "item"):
        return value.item()
    for kind in _KINDS:
        if isinstance(value, kind):
            return value if type(value) is kind else kind.__new__(kind, value)
    return value
