"""What a captured graph took for granted about its modules, and a quick check that it still holds."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import nn

from bnrestructure.capture.side_effects import is_plain_object
from bnrestructure.graph.boundaries import has_hooks, is_library_leaf

__all__ = ["ModuleState"]

#: What every module has: torch's own bookkeeping, watched below by other means.
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}
_DEPTH, _LARGEST = 3, 1000

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value))


def _contents(value: Any, depth: int = _DEPTH) -> Any:
    """Something equal for equal contents: of containers and plain objects what is in them, of anything else which object it is."""
    if _is_plain(value):
        return value
    inside = vars(value) if is_plain_object(value) else value
    if depth and isinstance(inside, dict | list | tuple) and len(inside) <= _LARGEST:
        items = inside.items() if isinstance(inside, dict) else enumerate(inside)
        return [(key, _contents(item, depth - 1)) for key, item in items]
    return _Same(value)


class _Same:
    """Equal to itself only as a holder of the very same object, which it keeps alive so that its identity is not reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def _watched(module: nn.Module) -> tuple[list[str], list[str]]:
    """Attributes whose values a capture takes for granted: (plain ones, those that have contents or are functions or objects).

    Tensors are not among them: a graph looks them up when it runs.
    """
    plain, deep = [], []
    private = is_library_leaf(module)  # what torch's own layers keep for themselves follows from their public attributes
    for key, value in module.__dict__.items():
        if key in _BOOKKEEPING or key.startswith("_bnr") or (private and key.startswith("_")):
            continue
        if _is_plain(value):
            plain.append(key)
        elif not isinstance(value, (torch.Tensor, nn.Module)):
            deep.append(key)
    return plain, deep


class ModuleState:
    """Training flags, attributes (eps, momentum, drop rates, configurations), children, hooks and classes of a module tree when captured.

    ``matches()`` costs about a microsecond a module; it runs before every restructured forward, so that freezing a BN, changing
    a drop rate, adding a hook or replacing a layer is noticed at the next step and leads to another graph.
    """

    def __init__(self, root: nn.Module) -> None:
        self._rows: list[tuple[Any, ...]] = []
        for module in root.modules():
            state = module.__dict__
            plain, deep = _watched(module)
            getter = itemgetter(*dict.fromkeys(["training", *plain]))
            contents = [(key, _contents(state[key])) for key in deep]
            children = tuple(state["_modules"].values())
            present = tuple(k for k, v in state["_parameters"].items() if v is None)
            self._rows.append(
                (module, state, type(module), getter, getter(state), children, has_hooks(state), len(state), present, contents)
            )

    def matches(self) -> bool:
        """Whether everything is still as it was captured."""
        try:
            return all(
                getter(state) == values
                and has_hooks(state) == hooked
                and tuple(state["_modules"].values()) == children
                and len(state) == size
                and type(module) is cls
                and all(state["_parameters"].get(k) is None for k in absent)
                and all(_contents(state[key]) == value for key, value in contents)
                for module, state, cls, getter, values, children, hooked, size, absent, contents in self._rows
            )
        except KeyError:
            return False
