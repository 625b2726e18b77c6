"""What a captured graph took for granted about its modules, and a quick check that it still holds."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bnrestructure.capture.program import dict_with
from bnrestructure.capture.reads import Reads
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

    def __repr__(self) -> str:
        return f"a {type(self.value).__name__}"

    __hash__ = None  # type: ignore[assignment]


class _Tensor(NamedTuple):
    """A tensor that the forward's own code read, which may have gone by any of this: ``values`` is the dict that it is in."""

    values: dict[str, Any]
    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, module: nn.Module, name: str) -> _Tensor | None:
        """That of this name, or None where the module has none."""
        values = dict_with(module, name)
        t = None if values is None else values[name]
        if values is None or not isinstance(t, torch.Tensor) or is_lazy(t):
            return None
        return cls(values, name, t.shape, t.dtype, t.device, t.requires_grad)

    def is_as_it_was(self) -> bool:
        """Whether one like it is in its place."""
        t = self.values.get(self.name)
        return (
            isinstance(t, torch.Tensor) and t.shape == self.shape and t.dtype is self.dtype
            and t.requires_grad is self.requires_grad and t.device == self.device
        )  # fmt: skip


class _Row(NamedTuple):
    """One module, as it was: its training flag, class, children, hooks, absent tensors, and the attributes that count."""

    path: str
    module: nn.Module
    state: dict[str, Any]
    cls: type
    getter: itemgetter[str]
    names: list[str]
    values: Any
    deep: list[tuple[str, Any]]
    absent: tuple[str, ...]
    children: tuple[Any, ...]
    hooked: bool
    nones: tuple[tuple[str, str], ...]
    layout: bool | None
    tensors: tuple[_Tensor, ...]

    @classmethod
    def of(cls, path: str, module: nn.Module, watched: set[str], read: set[str]) -> _Row:
        """The row of this module; ``watched`` are the attributes that count, where it has them, tensors if they are in ``read``."""
        state = module.__dict__
        present = {n: state[n] for n in sorted(watched & state.keys()) if not isinstance(state[n], torch.Tensor | nn.Module)}
        names = list(dict.fromkeys(["training", *(name for name, value in present.items() if _is_plain(value))]))
        own = state["_parameters"].keys() | state["_buffers"].keys() | state["_modules"].keys()
        getter: itemgetter[Any] = itemgetter(*names)
        return cls(
            path, module, state, type(module), getter, names, getter(state),
            deep=[(name, _contents(value)) for name, value in present.items() if name not in names],
            absent=tuple((watched | {"forward"}) - state.keys() - own),
            children=tuple(state["_modules"].values()),
            hooked=has_hooks(state),
            nones=tuple((kind, k) for kind in ("_parameters", "_buffers") for k, v in state[kind].items() if v is None),
            layout=_layout_of_weight(module),
            tensors=tuple(t for name in sorted(read) if (t := _Tensor.of(module, name)) is not None),
        )  # fmt: skip

    def difference(self) -> str | None:
        """What has changed since, or None."""
        state = self.state
        checks = {
            "its class": type(self.module) is self.cls,
            "its hooks": has_hooks(state) == self.hooked,
            "its submodules": tuple(state["_modules"].values()) == self.children,
            "the layout of its weight": _layout_of_weight(self.module) == self.layout,
            **{name: name not in state for name in self.absent},
            **{name: state[kind].get(name) is None for kind, name in self.nones},
            **{t.name: t.is_as_it_was() for t in self.tensors},
            **{name: name in state and _contents(state[name]) == value for name, value in self.deep},
        }
        values = self.values if len(self.names) > 1 else (self.values,)
        for name, value in zip(self.names, values, strict=True):
            checks[name] = name in state and _is_plain(state[name]) and state[name] == value
        return next((what for what, same in checks.items() if not same), None)


def _layout_of_weight(module: nn.Module) -> bool | None:
    """Whether a convolution's weight has its channels last in memory, on which the layout of its output depends."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.layout is not torch.strided:
        return None
    return weight.stride(1) == 1


def _watched(module: nn.Module, reads: Reads) -> set[str]:
    """The attributes whose values a capture took for granted: those that it read; of PyTorch's layers all public ones.

    Of tensors a graph looks up the values when it runs. What else may be asked of one is watched where code outside PyTorch's layers read it.
    """
    if is_library_leaf(module):  # what these keep for themselves follows from their public attributes
        return {name for name in module.__dict__ if not name.startswith("_")} - _BOOKKEEPING
    if module in reads.everything:
        return {name for name in module.__dict__ if not name.startswith("_bnr")} - _BOOKKEEPING
    return {name for name in reads.of(module) if not name.startswith("_bnr")} - _BOOKKEEPING


class ModuleState:
    """A module tree when captured: training flags, children, hooks, classes, and the attributes that the forward ``reads``.

    ``matches()`` costs about a microsecond a module; it runs before every restructured forward, so that freezing a BN, changing
    a drop rate, adding a hook or replacing a layer is noticed at the next step and leads to another graph. An attribute
    that the forward never read (a step counter, a trainer) may change as it likes.
    """

    def __init__(self, root: nn.Module, reads: Reads) -> None:
        self._rows = [
            _Row.of(path, module, _watched(module, reads), reads.outside(module))
            for path, module in root.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)  # called as it is, with what it is compiled with
        ]

    def matches(self) -> bool:
        """Whether everything is still as it was captured."""
        try:
            return all(
                getter(state) == values
                and has_hooks(state) == hooked
                and tuple(state["_modules"].values()) == children
                and type(module) is cls
                and all(name not in state for name in absent)
                and all(state[kind].get(name) is None for kind, name in nones)
                and (layout is None or _layout_of_weight(module) == layout)
                and all(_contents(state[name]) == value for name, value in deep)
                and all(t.is_as_it_was() for t in tensors)
                for _, module, state, cls, getter, _, values, deep, absent, children, hooked, nones, layout, tensors in self._rows
            )
        except (KeyError, RuntimeError, ValueError):  # gone, or an array now, which has no truth
            return False

    def difference(self) -> str | None:
        """The first thing that is not as it was, as ``layer1.0: drop_rate``; None where all is."""
        found = ((row.path, row.difference()) for row in self._rows)
        return next((f"{what} of {path or 'the model'}" for path, what in found if what is not None), None)
