"""The class swap: a restructured module is an instance of a generated subclass of its own class, and is swapped back on demand.

The object, its attributes, parameters, state_dict keys and ``isinstance`` stay the user's; what changes is which ``forward`` runs in
training mode. (FSDP2's ``fully_shard`` does the same.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, cast

import torch
from torch import nn

from bnrestructure.capture.regions import Options, Region, has_batch_norm, subregions
from bnrestructure.capture.tracer import Arguments, capture
from bnrestructure.core.errors import CaptureError
from bnrestructure.graph.boundaries import is_library_leaf

__all__ = ["find_regions", "is_restructured", "original_class", "region_of", "swap_in", "swap_out", "training_flags"]

_REGION = "_bnr_region"


class Restructured:
    """Marks the generated classes; ``_bnr_original`` is the class that an instance had before."""

    _bnr_original: type[nn.Module]


def is_restructured(module: nn.Module) -> bool:
    """Whether this very module (not its children) is swapped."""
    return isinstance(module, Restructured)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as its author wrote it."""
    return module._bnr_original if isinstance(module, Restructured) else type(module)


def region_of(module: nn.Module) -> Region:
    """The region that a swapped module carries."""
    return module.__dict__[_REGION]


@cache
def _restructured_class(cls: type[nn.Module]) -> type[nn.Module]:
    @wraps(cls.forward)  # callers look at the signature: torch.export, torch.fx, trainers that drop columns
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return cls.forward(self, *args, **kwargs)
        return _run(self, args, kwargs)

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
        options = Options() if region is None else region.options
        if rest and isinstance(rest[0], dict):
            rest[0] = {k: v for k, v in rest[0].items() if k != _REGION}
        return (_rebuild, (function, arguments, options), *rest)

    name = f"Restructured{cls.__name__}"
    members = {
        "_bnr_original": cls, "forward": forward, "__reduce_ex__": reduce_ex, "__module__": cls.__module__,
        "__qualname__": name, "__doc__": cls.__doc__,
    }  # fmt: skip
    return type(name, (Restructured, cls), members)


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return region_of(module).run(module, original_class(module).forward, args, kwargs)


_run = torch.compiler.disable(_run)  # to torch.compile a region is one opaque call


def _rebuild(function: Any, arguments: tuple[Any, ...], options: Options) -> nn.Module:
    module = function(*arguments)
    _swap_one(module, options)
    return module


def _swap_one(module: nn.Module, options: Options) -> None:
    if not is_restructured(module):
        module.__class__ = _restructured_class(type(module))  # type: ignore[arg-type]
    module.__dict__[_REGION] = Region(options, on_opaque=swap_in)


def swap_in(module: nn.Module, options: Options) -> None:
    """Swap the maximal submodules of ``module`` (itself included) that capture can follow and that hold batch norms."""
    if not has_batch_norm(module):
        return
    found, _ = find_regions(module)
    for region in found:
        _swap_one(region, options)


def find_regions(module: nn.Module) -> tuple[list[nn.Module], dict[nn.Module, str]]:
    """(the maximal submodules that can be regions, outermost first; why others with batch norms cannot be)."""
    reasons: dict[nn.Module, str] = {}
    if not has_batch_norm(module):
        return [], reasons
    inner: list[nn.Module]
    try:
        if "forward" in module.__dict__:
            raise CaptureError("its forward is replaced on the instance")
        if is_library_leaf(module):
            raise CaptureError("it is one of torch's own layers, called from code that the tracer cannot follow")
        with training_flags(module):
            _, opaque = capture(module, original_class(module).forward, Arguments.assumed(original_class(module).forward))
    except CaptureError as error:
        reasons[module] = str(error)
        found, inner = [], list(module.children())
    else:
        found, inner = [module], [child for child, _ in subregions(module, opaque)]
        reasons.update(opaque)
    for child in inner:
        deeper, why = find_regions(child)
        found += deeper
        reasons.update(why)
    return found, reasons


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
        if isinstance(m, Restructured):
            m.__class__ = m._bnr_original  # type: ignore[assignment]
            m.__dict__.pop(_REGION, None)
