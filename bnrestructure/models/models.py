"""From MODEL on the command line to a module: torchvision, timm, or the user's own factory. Nothing is downloaded."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnrestructure.core.errors import UsageError

__all__ = ["builder_module", "call_factory", "load_factory", "load_model"]

#: Builders whose own initialisation takes half a minute; PyTorch's default serves as well for everything done here.
_SLOW_TO_INITIALISE = ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3")


def load_model(name: str) -> nn.Module:
    """The model that MODEL names, with random weights of a fixed seed. Raises UsageError for one that cannot be had."""
    if name.startswith("timm:"):
        return _checked(name, _timm_factory(name.removeprefix("timm:")))
    if ":" in name:
        return _checked(name, load_factory(name))
    return _checked(name, _torchvision_factory(name))


def _checked(name: str, factory: Callable[[], Any]) -> nn.Module:
    torch.manual_seed(0)
    model = call_factory(name, factory)
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(f"{name} is a ScriptModule: restructure it before torch.jit.script or torch.jit.trace")
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def call_factory(name: str, factory: Callable[[], Any]) -> Any:
    """What the factory returns; a UsageError with one line of what it raised."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
            return factory()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # a user's factory may raise anything; it is the user's line to see
        raise UsageError(f"{name} raised {_in_one_line(error)}") from error


def load_factory(name: str) -> Callable[[], Any]:
    """The callable behind ``package.module:factory`` or ``file.py:factory``. Raises UsageError with near names."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UsageError(f"expected package.module:factory or file.py:factory, got {name!r}")
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{place} has no {part!r}{_hint(part, dir(found))}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}, expected a function that returns a model")
    return found


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UsageError(f"there is no file {path}{_hint(path.name, near)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that classes of the file can be pickled and deep-copied
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        _import(str(path), lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    finally:
        sys.path.pop(0)
    return module


def _module_by_name(name: str) -> Any:
    sys.path.insert(0, "")
    try:
        return _import(name, lambda: importlib.import_module(name))
    finally:
        sys.path.remove("")


def _import(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise UsageError(f"importing {name} raised {_in_one_line(error)}") from error


def _in_one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"


def _torchvision_factory(name: str) -> Callable[[], Any]:
    from torchvision import models

    names = models.list_models()
    if name.endswith(".py"):
        raise UsageError(f"which model of {name}? Name the function that returns it: {name}:FUNCTION")
    if name not in names:
        hint = (
            _hint(name, names)
            or "; torchvision.models.list_models() gives all names, other models are package.module:factory"
        )
        raise UsageError(f"unknown model {name!r}{hint}")
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name in _SLOW_TO_INITIALISE:
        options["init_weights"] = False
    return lambda: builder(**options)


def builder_module(name: str) -> str:
    """The module that a torchvision builder is defined in (``torchvision.models.resnet``), "" for other models."""
    if ":" in name:
        return ""
    from torchvision import models

    return models.get_model_builder(name).__module__


def _timm_factory(name: str) -> Callable[[], Any]:
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise UsageError(f"timm:{name} needs the timm package, which is not installed here") from error
    names = timm.list_models()
    if name not in names:
        raise UsageError(f"unknown timm model {name!r}{_hint(name, names)}")
    return lambda: timm.create_model(name, pretrained=False)


def _hint(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
