"""The class swap: a restructured module is an instance of a generated subclass of its own class, and is swapped back on demand.

The object, its attributes, parameters, state_dict keys, ``isinstance`` and the class's name stay the user's; what changes is which
``forward`` runs in training mode. (FSDP2's ``fully_shard`` does the same.)

Every module that holds a batch norm is swapped, at every level, and the outermost one that is *called* runs rewritten: where a model's
forward cannot be captured, or the parts of a model are called by somebody else, the largest parts that are called still are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, cast

import torch
from torch import nn

from bnrestructure.capture.regions import Options, Region, holding_batch_norms
from bnrestructure.graph.boundaries import is_called, is_library_leaf

__all__ = ["is_restructured", "original_class", "region_of", "swap_in", "swap_out", "training_flags"]

_REGION = "_bnr_region"


class Restructured:
    """Marks the generated classes; ``_bnr_original`` is the class that an instance had before."""

    _bnr_original: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A generated class is no subclass that its author's __init_subclass__ would want to know of."""


def is_restructured(module: nn.Module) -> bool:
    """Whether this very module (not its children) is swapped."""
    return isinstance(module, Restructured)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as its author wrote it."""
    return module._bnr_original if isinstance(module, Restructured) else type(module)


def region_of(module: nn.Module) -> Region | None:
    """The region that a swapped module carries; None for one that is not swapped, or was made from one (a slice of a Sequential)."""
    return module.__dict__.get(_REGION)


@cache
def _restructured_class(cls: type[nn.Module]) -> type[nn.Module]:
    @wraps(cls.forward)  # callers look at the signature: torch.export, torch.fx, trainers that drop columns
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or torch.compiler.is_exporting():
            return cls.forward(self, *args, **kwargs)
        return _run(self, cls, args, kwargs)

    def reduce_ex(self: nn.Module, protocol: int) -> Any:
        own = type(self)
        region = self.__dict__.pop(_REGION, None)
        self.__class__ = cls  # the generated class cannot be imported by name: pickle and deepcopy as the original
        try:
            function, arguments, *rest = cast("tuple[Any, ...]", self.__reduce_ex__(protocol))
        finally:
            self.__class__ = own
            if region is not None:
                self.__dict__[_REGION] = region
        if rest and isinstance(rest[0], dict):
            rest[0] = {k: v for k, v in rest[0].items() if k != _REGION}
        if region is None:
            return (function, arguments, *rest)
        return (_rebuild, (function, arguments, region.options), *rest)

    def prepare_scriptable(self: nn.Module) -> nn.Module:
        """What torch.jit.script compiles: the same tensors under the original class."""
        plain = copy.copy(self.__dict__)
        plain.pop(_REGION, None)
        plain["_modules"] = dict(self._modules)  # the compiler replaces children in it
        double = cls.__new__(cls)
        double.__dict__.update(plain)
        return double

    members = {
        "_bnr_original": cls, "forward": forward, "__reduce_ex__": reduce_ex, "__prepare_scriptable__": prepare_scriptable,
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
    }  # fmt: skip
    # By type itself: a metaclass of the author's may register the classes that it makes, or ask for more arguments.
    return type.__new__(type(cls), cls.__name__, (Restructured, cls), members)


def _run(module: nn.Module, cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    region = region_of(module)
    if region is None:
        return cls.forward(module, *args, **kwargs)
    replica = getattr(module, "_is_replica", False)  # nn.DataParallel's, of this very module
    if not replica and not region.belongs_to(module):  # somebody made a module with a copy of another one's __dict__, as copy.copy does
        region = module.__dict__[_REGION] = Region(region.options)
    return region.run(module, cls.forward, args, kwargs)


#: To torch.compile a region is one opaque call.
_run = torch.compiler.disable(
    _run, reason="a restructured module runs kernels of its own; for one graph: torch.compile(model, backend='bnrestructure') instead"
)


def _rebuild(function: Any, arguments: tuple[Any, ...], options: Options) -> nn.Module:
    module = function(*arguments)
    _swap_one(module, options)
    return module


def _swap_one(module: nn.Module, options: Options) -> None:
    if not is_restructured(module):
        module.__class__ = _restructured_class(type(module))  # type: ignore[arg-type]
    module.__dict__[_REGION] = Region(options)


def swap_in(module: nn.Module, options: Options) -> None:
    """Swap every module in this tree that could be called and captured: it holds a batch norm, and its forward is its class's own."""
    with_batch_norms = holding_batch_norms(module)
    for m in module.modules():
        if m in with_batch_norms and _can_be_swapped(m):
            _swap_one(m, options)


def _can_be_swapped(m: nn.Module) -> bool:
    if is_library_leaf(m) or isinstance(m, nn.modules.batchnorm._BatchNorm):  # neither has anything but itself to fuse
        return False
    if "forward" in m.__dict__ or isinstance(m, torch.jit.ScriptModule):
        return False
    return is_called(m)


@contextmanager
def training_flags(module: nn.Module) -> Iterator[None]:
    """As if ``module.train()`` had been called when the module is in eval mode; every flag is put back."""
    if module.training:
        yield
        return
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = True
        yield
    finally:
        for m, flag in flags:
            m.training = flag


def swap_out(module: nn.Module) -> None:
    """Give every swapped module in this tree its own class back."""
    for m in module.modules():
        m.__dict__.pop(_REGION, None)
        if isinstance(m, Restructured) and type(m) is _restructured_class(m._bnr_original):  # type: ignore[arg-type]
            m.__class__ = m._bnr_original  # type: ignore[assignment]
