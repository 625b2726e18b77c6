"""Module paths as a reader inside a module sees them."""

from __future__ import annotations

__all__ = ["relative", "shortened"]


def shortened(sites: list[str], group: str, shown: int = 2) -> str:
    """Names of sites as seen from a module: ``bn1`` inside ``layer1.0``, the first few of many."""
    names = [relative(site, group) for site in dict.fromkeys(sites)]
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" +{rest}" if rest > 0 else "")


def relative(path: str, group: str) -> str:
    """A path as seen from inside ``group``, but never a bare index (``downsample.1``, not ``1``)."""
    while group:
        if path.startswith(f"{group}.") and not path[len(group) + 1].isdigit():
            return path[len(group) + 1 :]
        group = group.rpartition(".")[0]
    return path
