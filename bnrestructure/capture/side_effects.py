"""What a forward() does besides computing its result - attributes written, contexts entered - seen while it is traced, and undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnrestructure.capture.contents import DEPTH, Snapshot, depth_inside, is_simple

__all__ = ["Attributes", "ambient_modes"]


def ambient_modes() -> tuple[Any, ...]:
    """The modes that decide what an operation means and that a graph does not record: gradients on or off, which come first; the dtype of
    new tensors; autocast and its dtype."""
    autocast = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.get_default_dtype(), *autocast)


class Attributes:
    """The Python attributes of a module tree, and what is in the containers, arrays and plain objects among them, at one moment."""

    def __init__(self, root: nn.Module) -> None:
        self._saved: list[tuple[Snapshot, nn.Module, str]] = []
        self._own: dict[nn.Module, dict[str, Any]] = {}
        seen: set[int] = set()
        for module in root.modules():
            self._own[module] = self._now(module)
            for key, value in self._own[module].items():
                self._save(value, module, key, seen, DEPTH)

    def _save(self, value: Any, owner: nn.Module, key: str, seen: set[int], depth: int) -> None:
        if depth <= 0 or is_simple(value) or isinstance(value, Tensor | nn.Module) or id(value) in seen:
            return
        snapshot = Snapshot(value)
        if not snapshot.is_of_anything:
            return
        seen.add(id(value))
        self._saved.append((snapshot, owner, key))
        for item in (snapshot.parts or {}).values():
            self._save(item, owner, key, seen, depth_inside(value, depth))

    def changed_on(self, module: nn.Module) -> bool:
        """Whether some attribute of this very module is another object than it was."""
        now, before = self._now(module), self._own.get(module, {})
        return now.keys() != before.keys() or any(now[key] is not before[key] for key in now)

    def restore(self) -> tuple[nn.Module, str] | None:
        """Undo what has been written since, and name one (module, attribute) that was, or None."""
        written = None
        for module, before in self._own.items():
            now = self._now(module)
            for key in now.keys() | before.keys():
                if key in now and key in before and now[key] is before[key]:
                    continue
                written = (module, key)
                if key in before:
                    module.__dict__[key] = before[key]
                else:
                    del module.__dict__[key]
        for snapshot, owner, key in self._saved:
            if snapshot.put_back():
                written = (owner, key)
        return written

    @staticmethod
    def _now(module: nn.Module) -> dict[str, Any]:
        return {k: v for k, v in module.__dict__.items() if not k.startswith("_bnr")}
