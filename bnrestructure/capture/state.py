"""What a captured graph took for granted about its modules, and a quick check that it still holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bnrestructure.capture.contents import contents, is_proxy, is_simple
from bnrestructure.capture.hooks import hooks_of, objection_to_hooks
from bnrestructure.capture.program import dict_with
from bnrestructure.capture.reads import Reads
from bnrestructure.capture.surroundings import Missing, Variable, surroundings_of
from bnrestructure.graph.boundaries import REPLACED, has_hooks, is_library_leaf

__all__ = ["ModuleState"]

#: What every module has: torch's own bookkeeping, watched below by other means.
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}


class _Tensor(NamedTuple):
    """A tensor that other code than PyTorch's layers read: that code may have decided by any of this, or by where it is.

    ``values`` is the dict that holds it: the module's attributes, parameters or buffers.
    """

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
        if values is None or is_proxy(t) or not isinstance(t, torch.Tensor) or is_lazy(t):
            return None
        return cls(values, name, t.shape, t.dtype, t.device, t.requires_grad)

    def is_as_it_was(self) -> bool:
        """Whether one like it is in its place."""
        t = self.values.get(self.name)
        return (
            isinstance(t, torch.Tensor) and t.shape == self.shape and t.dtype is self.dtype
            and t.requires_grad is self.requires_grad and t.device == self.device
        )  # fmt: skip


class _OfClass(NamedTuple):
    """An attribute that the instance does not have, where its class has it: a default, a method."""

    owner: type
    name: str
    value: Any

    @classmethod
    def of(cls, module: nn.Module, name: str) -> _OfClass | None:
        """That of this name, or None where no class of the module has it."""
        owner = next((base for base in type(module).__mro__ if name in vars(base)), None)
        return None if owner is None else cls(owner, name, vars(owner)[name])

    def is_as_it_was(self) -> bool:
        """Whether the class has the same object."""
        return vars(self.owner).get(self.name) is self.value


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
    absent: frozenset[str]
    children: tuple[Any, ...]
    hooked: bool
    nones: tuple[tuple[str, str], ...]
    layout: tuple[torch.Size, bool] | None
    tensors: tuple[_Tensor, ...]
    of_class: tuple[_OfClass, ...]

    @classmethod
    def of(cls, path: str, module: nn.Module, watched: set[str], read: set[str], taken: set[int]) -> _Row:
        """The row of this module; ``watched`` are the attributes that count, where it has them, tensors if they are in ``read``.

        What is in an object is compared in one row: ``taken`` are the objects, by identity, that other rows look into.
        """
        state = module.__dict__
        named = {n: state[n] for n in sorted(watched & state.keys())}
        present = {n: value for n, value in named.items() if is_proxy(value) or not isinstance(value, torch.Tensor | nn.Module)}
        # One name twice: of a single name the getter gives no tuple.
        plain = (name for name, value in present.items() if (is_simple(value) or id(value) in taken) and name != "training")
        always = "training" if "training" in state else "_modules"  # a compiled module asks the one that it wraps
        names = [always, always, *plain]
        taken.update(id(value) for name, value in present.items() if name not in names)
        own = state["_parameters"].keys() | state["_buffers"].keys() | state["_modules"].keys()
        absent = frozenset((watched | REPLACED) - state.keys() - own)
        getter: itemgetter[Any] = itemgetter(*names)
        return cls(
            path, module, state, type(module), getter, names, getter(state),
            deep=[(name, contents(value)) for name, value in present.items() if name not in names],
            absent=absent,
            of_class=tuple(found for name in sorted(read) if name in absent and (found := _OfClass.of(module, name)) is not None),
            children=(*state["_modules"], *state["_modules"].values()),
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
            "its submodules": (*state["_modules"], *state["_modules"].values()) == self.children,
            "the sizes or the layout of its weight": _layout_of_weight(self.module) == self.layout,
            **{name: name not in state for name in self.absent},
            **{name: state[kind].get(name) is None for kind, name in self.nones},
            **{t.name: t.is_as_it_was() for t in self.tensors},
            **{found.name: found.is_as_it_was() for found in self.of_class},
            **{name: name in state and contents(state[name]) == value for name, value in self.deep},
            **{name: name in state and _equal(state[name], value) for name, value in zip(self.names, self.values, strict=True)},
        }
        return next((what for what, same in checks.items() if not same), None)


def _equal(a: Any, b: Any) -> bool:
    return a is b or (is_simple(a) and contents(a) == contents(b))


def _layout_of_weight(module: nn.Module) -> tuple[torch.Size, bool] | None:
    """The sizes of a convolution's weight, on which those of its output depend, and whether it has its channels last in memory, on which
    the layout of its output does.
    """
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.layout is not torch.strided:
        return None
    return weight.shape, weight.stride(1) == 1


def _watched(module: nn.Module, reads: Reads) -> set[str]:
    """The attributes whose values a capture took for granted: those that it read; of PyTorch's layers all public ones.

    Of tensors (:class:`_Tensor`) a graph looks up the values when it runs.
    """
    if is_library_leaf(module):  # what these keep for themselves follows from their public attributes
        return {name for name in module.__dict__ if not name.startswith("_")} - _BOOKKEEPING
    if module in reads.everything:
        return {name for name in module.__dict__ if not name.startswith("_bnr")} - _BOOKKEEPING
    return {name for name in reads.of(module) if not name.startswith("_bnr")} - _BOOKKEEPING


class ModuleState:
    """A module tree when captured: training flags, children, hooks, classes, shared parameters, and the attributes that the forward
    ``reads``; and what the functions of the tree find around them (surroundings.py), but for the parts that a graph ``calls``.

    ``matches()`` costs about a microsecond a module; it runs before every restructured forward, so that freezing a BN, changing
    a drop rate, adding a hook or replacing a layer is noticed at the next step and leads to another graph. An attribute
    that the forward never read (a step counter, a trainer) may change as it likes.
    """

    def __init__(self, root: nn.Module, reads: Reads, calls: Collection[nn.Module] = ()) -> None:
        self._root, self._reads, self._hooks = root, reads, hooks_of(root)
        paths = {module: path for path, module in root.named_modules()}
        elsewhere = {module: f"a {type(module).__name__} that is no submodule" for module in reads.names if module not in paths}
        taken: set[int] = set()
        self._rows = [
            _Row.of(path, module, _watched(module, reads), reads.outside(module), taken)
            for module, path in (paths | elsewhere).items()
            if not isinstance(module, torch.jit.ScriptModule)  # called as it is, with what it is compiled with
        ]
        self._tied = _tied(paths)
        of_class = (found.value for row in self._rows for found in row.of_class)
        in_attributes = (row.state[name] for row in self._rows for name, _ in row.deep if not is_library_leaf(row.module))
        of_tensors = (t.values[t.name] for row in self._rows for t in row.tensors)
        as_they_are = {module for called in calls for module in called.modules()}
        self._followed = [row.module for row in self._rows if row.module not in as_they_are and not is_library_leaf(row.module)]
        around = surroundings_of(self._followed, [*of_class, *in_attributes, *of_tensors])
        self._variables: list[Variable | Missing] = [*around.variables, *around.missing]

    def matches(self) -> bool:
        """Whether everything is still as it was captured."""
        try:
            for _, module, state, cls, getter, _, values, deep, absent, children, hooked, nones, layout, tensors, of_class in self._rows:
                now, modules = getter(state), state["_modules"]
                if (
                    not (all(map(is_, now, values)) or all(map(_equal, now, values)))
                    or has_hooks(state) != hooked
                    or ((modules or children) and (*modules, *modules.values()) != children)
                    or type(module) is not cls
                    or not state.keys().isdisjoint(absent)
                    or (layout is not None and _layout_of_weight(module) != layout)
                    or (nones and any(state[kind].get(name) is not None for kind, name in nones))
                    or (deep and any(contents(state[name]) != value for name, value in deep))
                    or (tensors and not all(t.is_as_it_was() for t in tensors))
                    or (of_class and not all(found.is_as_it_was() for found in of_class))
                ):
                    return False
        except KeyError:
            return False
        return all(map(_is_one, self._tied)) and all(v.is_as_it_was() for v in self._variables) and not self._hooks_write()

    def _hooks_write(self) -> bool:
        """Whether hooks that were not there may write what the forward reads."""
        if not self._hooks:  # a first one is a difference
            return False
        hooks = hooks_of(self._root)
        if hooks != self._hooks:
            if objection_to_hooks(self._root, self._followed, self._reads) is not None:
                return True
            self._hooks = hooks
        return False

    def difference(self) -> str | None:
        """The first thing that is not as it was, as ``layer1.0: drop_rate``; None where all is."""
        found = ((row.path, row.difference()) for row in self._rows)
        changed = next((f"{what} of {path or 'the model'}" for path, what in found if what is not None), None)
        changed = changed or next((f"{tied[0][1]}, which was shared" for tied in self._tied if not _is_one(tied)), None)
        changed = changed or next((f"the variable {v.name}" for v in self._variables if not v.is_as_it_was()), None)
        return changed or ("the model's hooks" if self._hooks_write() else None)


def _tied(modules: Iterable[nn.Module]) -> list[list[tuple[dict[str, Any], str]]]:
    """The places (a dict and a name) of each parameter and buffer that has several."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in modules:
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    places.setdefault(id(value), []).append((values, name))
    return [of for of in places.values() if len(of) > 1]


def _is_one(places: list[tuple[dict[str, Any], str]]) -> bool:
    """Whether the same tensor is in all of these places."""
    (values, name), *others = places
    return all(v.get(n) is values.get(name) for v, n in others)
