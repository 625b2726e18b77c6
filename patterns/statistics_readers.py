"""Batch norms that read the same statistics one after another: each can hand them to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from bnrestructure.graph.ir import Finalize
from bnrestructure.graph.provenance import provenance

__all__ = ["StatisticsReaders", "statistics_readers"]

Halves = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class StatisticsReaders:
    """The ``first`` batch norm to read some statistics, and what reads them ``later``.

    ``parts``: (mean, the mean behind it) and the same of the variance, where both are concats of two parts that nobody reads before.
    """

    first: Finalize
    parts: tuple[Halves, Halves] | None
    later: set[fx.Node]


def statistics_readers(node: fx.Node) -> StatisticsReaders | None:
    """A batch norm that could make the concat of vectors which it reads, or whose statistics have other readers behind it."""
    finalize = Finalize.of(node)
    if finalize is None or finalize.behind_mean is not None:
        return None
    readers = {*finalize.mean.users, *finalize.var.users} - {node}
    later = {reader for reader in readers if reader > node}
    mean, var = _two_parts(finalize.mean), _two_parts(finalize.var)
    parts = None if mean is None or var is None or later != readers else (mean, var)
    return StatisticsReaders(finalize, parts, later) if parts is not None or later else None


def _two_parts(vector: fx.Node) -> Halves | None:
    """The two vectors that this one is the concat of."""
    if vector.target is not torch.cat or not provenance(vector).vector:
        return None
    first, last = cast("Halves", vector.args[0])
    return first, last
