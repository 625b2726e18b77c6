"""What a forward() does besides computing its result - attributes written, contexts entered - seen while it is traced, and undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnrestructure.capture.contents import DEPTH, Snapshot, attributes_of, behind, depth_inside, is_proxy, is_simple, state_of
from bnrestructure.capture.surroundings import Missing, Variable, surroundings_of
from bnrestructure.graph.boundaries import is_library_leaf

__all__ = ["Around", "Attributes", "ambient_modes"]


def ambient_modes() -> tuple[Any, ...]:
    """The modes that decide what an operation means and that a graph does not record: gradients on or off, which come first; the dtype of
    new tensors; autocast and its dtype."""
    autocast = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.get_default_dtype(), *autocast)


def _snapshots(value: Any, seen: set[int], depth: int = DEPTH) -> Iterator[Snapshot]:
    """Of this value, where it can change, and of what is in it; of nothing twice."""
    if is_proxy(value):
        value = behind(value)
    if depth <= 0 or is_simple(value) or isinstance(value, Tensor | nn.Module) or id(value) in seen:
        return
    snapshot = Snapshot(value)
    if snapshot.is_of_anything:
        seen.add(id(value))
        yield snapshot
        for item in (snapshot.parts or {}).values():
            yield from _snapshots(item, seen, depth_inside(value, depth))
        if (attributes := attributes_of(value)) is not None:
            yield from _snapshots(attributes, seen, depth)


class Around:
    """What the forwards of a module tree find around them, at one moment; ``going_on`` are iterators and generators of random numbers,
    ``asking`` and ``catches`` as in :class:`bnrestructure.capture.surroundings.Found`.
    """

    def __init__(self, root: nn.Module) -> None:
        found = surroundings_of([m for m in root.modules() if not is_library_leaf(m)], kept=True)
        self.going_on, self.asking, self.catches = found.going_on, found.asking, found.catches
        self._variables: list[Variable | Missing] = [*found.variables, *found.missing]
        self._generators = [state for generator in found.going_on if (state := state_of(generator)) is not None]
        self._caches = [(cached, cached.cache_info().misses) for cached in found.caches]
        seen: set[int] = set()
        self._saved = [snapshot for v in found.variables if v.inside is not None for snapshot in _snapshots(v.value, seen)]

    def changed(self) -> str | None:
        """The name of one that is not as it was."""
        return next((v.name for v in self._variables if not v.is_as_it_was()), None)

    def written(self) -> set[tuple[int, str]]:
        """All that are not as they were: (identity of where the variable is, its name)."""
        return {(id(v.home), v.name) for v in self._variables if not v.is_as_it_was()}

    def restore(self) -> str | None:
        """Undo what has been written since, and name one that was. Caches forget what they learnt: it is of fake tensors."""
        written = self.changed()
        if written is not None:
            for variable in self._variables:
                variable.put_back()
            for snapshot in self._saved:
                snapshot.put_back()
        for set_state, state in self._generators:
            set_state(state)
        for cached, misses in self._caches:
            if cached.cache_info().misses != misses:
                cached.cache_clear()
        return written


class Attributes:
    """The Python attributes of a module tree, and what is in the containers, arrays and plain objects among them, at one moment."""

    def __init__(self, root: nn.Module) -> None:
        self._saved: list[tuple[Snapshot, nn.Module, str]] = []
        self._own: dict[nn.Module, dict[str, Any]] = {}
        seen: set[int] = set()
        for module in root.modules():
            self._own[module] = self._now(module)
            for key, value in self._own[module].items():
                self._saved += [(snapshot, module, key) for snapshot in _snapshots(value, seen)]

    def changed_on(self, module: nn.Module) -> bool:
        """Whether some attribute of this module, or of one in it, is another object than it was."""
        for m in module.modules():
            now, before = self._now(m), self._own.get(m, {})
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in now):
                return True
        return False

    def restore(self) -> list[tuple[nn.Module, str]]:
        """Undo what has been written since; which (module, attribute) that was."""
        written = []
        for module, before in self._own.items():
            now = self._now(module)
            for key in now.keys() | before.keys():
                if key in now and key in before and now[key] is before[key]:
                    continue
                written.append((module, key))
                if key in before:
                    module.__dict__[key] = before[key]
                else:
                    del module.__dict__[key]
        for snapshot, owner, key in self._saved:
            if snapshot.put_back():
                written.append((owner, key))
        return written

    @staticmethod
    def _now(module: nn.Module) -> dict[str, Any]:
        return {k: v for k, v in module.__dict__.items() if not k.startswith("_bnr")}
