"""What a rule of the IR is, and what it looks at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from bnrestructure.graph.view import Fused

__all__ = ["Invariant", "Look"]


class Look:
    """The views of a graph's nodes and their outputs, each taken once: rules look at the same nodes again and again."""

    def __init__(self, views: Iterable[Fused]) -> None:
        self._views: dict[object, Fused] = {view.node: view for view in views}
        self._kinds: dict[type[Fused], list[Fused]] = defaultdict(list)
        for view in views:
            self._kinds[type(view)].append(view)
        self._outs: dict[fx.Node, dict[str, fx.Node]] = {}

    def at(self, node: object) -> Fused | None:
        """The view of a node that calls one of the ops, or None."""
        return self._views.get(node)

    def of(self, kind: type[Fused]) -> Sequence[Fused]:
        """The views of one kind, in graph order."""
        return self._kinds.get(kind, ())

    def outs(self, view: Fused) -> dict[str, fx.Node]:
        """The outputs of a node that have a node of their own, by name."""
        found = self._outs.get(view.node)
        if found is None:
            found = self._outs[view.node] = view.outs()
        return found


@dataclass(frozen=True)
class Invariant:
    """A rule about the nodes of some kinds.

    ``broken`` says what is wrong at one of them, given its view and those of the others, or gives None where the rule holds.
    """

    name: str
    of: tuple[type[Fused], ...]
    broken: Callable[[Any, Look], str | None]
