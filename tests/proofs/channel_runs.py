"""Values in runs of channels: a tensor that a concat made holds one expression for each of its segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy as sp
from algebra import NotProved

__all__ = ["Meaning", "Value", "failed", "parts", "runs"]

#: What a tensor holds: (number of channels, expression) for each run of channels; 0 channels: the expression goes for any number of them.
Value = tuple[tuple[int, sp.Expr], ...]

#: What an operator does to values: see meanings.py.
Meaning = Callable[..., Sequence[Any]]


def failed(value: Any) -> None:
    """Raise what stands in the place of a value that could not be read."""
    if isinstance(value, Exception):
        raise value


def runs(values: Sequence[Value]) -> list[tuple[int, list[sp.Expr]]]:
    """Values side by side: cut where any of them is cut; what is the same for all channels goes with each."""
    for value in values:
        failed(value)
    cuts: set[int] = set()
    for value in values:
        at = 0
        for n, _ in value:
            at += n
            cuts.add(at)
    edges = sorted(cuts - {0})
    if not edges:
        return [(0, [value[0][1] for value in values])]
    found = []
    first = 0
    for edge in edges:
        row = []
        for value in values:
            at = 0
            for n, expression in value:
                if n == 0 or (at <= first and edge <= at + n):
                    if n and (at, at + n) != (first, edge) and expression.free_symbols:
                        raise NotProved(f"channels {first} to {edge} of what was made as {at} to {at + n}")
                    row.append(expression)
                    break
                at += n
            else:
                raise NotProved("tensors of different numbers of channels meet")
        found.append((edge - first, row))
        first = edge
    return found


def parts(value: Value, channels: int) -> list[tuple[tuple[int, int], sp.Expr]]:
    """(range of channels, expression) of each run."""
    found, at = [], 0
    for n, e in value:
        found.append(((at, at + (n or channels)), e))
        at += n
    return found
