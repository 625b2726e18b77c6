"""What a forward() does besides computing its result - attributes written, contexts entered - seen while it is traced, and undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Attributes", "ambient_modes"]

_DEPTH = 3  # containers and plain objects inside attributes are looked into this far


def ambient_modes() -> tuple[Any, ...]:
    """The modes that decide what an operation means and that a graph does not record: gradients on or off, autocast and its dtype."""
    devices = ("cpu", "cuda")
    return (torch.is_grad_enabled(), *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices))


def is_plain_object(value: Any) -> bool:
    """Whether this is an object whose attributes are its whole state: a configuration, a namespace, a counter."""
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value):
        return False
    return type(getattr(value, "__dict__", None)) is dict and not type(value).__module__.startswith("torch")


class Attributes:
    """The Python attributes of a module tree, and what is in the containers and plain objects among them, at one moment."""

    def __init__(self, root: nn.Module) -> None:
        self._saved: list[tuple[Any, Any, nn.Module, str]] = []
        self._own: dict[nn.Module, dict[str, Any]] = {}
        seen: set[int] = set()
        for module in root.modules():
            state = {k: v for k, v in module.__dict__.items() if not k.startswith("_bnr")}
            self._own[module] = state
            for key, value in state.items():
                self._save(value, module, key, seen, _DEPTH)

    def _save(self, value: Any, owner: nn.Module, key: str, seen: set[int], depth: int) -> None:
        container = value.__dict__ if is_plain_object(value) else value
        if depth == 0 or not isinstance(container, dict | list | set) or id(container) in seen:
            return
        seen.add(id(container))
        self._saved.append((container, container.copy(), owner, key))
        for item in container.values() if isinstance(container, dict) else container:
            self._save(item, owner, key, seen, depth - 1)

    def changed_on(self, module: nn.Module) -> bool:
        """Whether some attribute of this very module is another object than it was."""
        return _differs(self._now(module), self._own.get(module, {}))

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
        for container, before, owner, key in self._saved:
            if _differs(container, before):
                written = (owner, key)
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)
        return written

    @staticmethod
    def _now(module: nn.Module) -> dict[str, Any]:
        return {k: v for k, v in module.__dict__.items() if not k.startswith("_bnr")}


def _differs(a: Any, b: Any) -> bool:
    """Whether two containers of one kind hold different objects (by identity, in order where they have one)."""
    if len(a) != len(b):
        return True
    if isinstance(a, dict):
        return any(key not in b or value is not b[key] for key, value in a.items())
    if isinstance(a, list):
        return any(x is not y for x, y in zip(a, b, strict=True))
    return {id(x) for x in a} != {id(x) for x in b}
