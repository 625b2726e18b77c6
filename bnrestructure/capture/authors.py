"""Who wrote code: the user, whose variables may be others in the next step, or an installed package."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["LIBRARIES", "attributes_of_module", "is_by_user", "is_class_by_user", "package_of", "package_of_forward"]

#: Whose code decides by nothing that a user would change between two steps.
LIBRARIES = frozenset({"torch", "numpy", "bnrestructure", *sys.stdlib_module_names})
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_WRITTEN_IN_PYTHON = 1 << 9  # CPython's Py_TPFLAGS_HEAPTYPE


def package_of(names: Mapping[str, Any]) -> str:
    """The package that code with these globals is in, whatever it passes itself off as."""
    return str(names.get("__name__", "")).partition(".")[0]


def package_of_forward(kind: type) -> str:
    """The package that the forward of a class was written in."""
    return package_of(getattr(vars(kind).get("forward"), "__globals__", {}))


def is_by_user(names: Mapping[str, Any]) -> bool:
    """Whether code with these globals is the user's, and of no library or package that was installed."""
    file, package = str(names.get("__file__", "")), package_of(names)
    return package not in LIBRARIES and not _INSTALLED.search(file) and not _is_beside_its_metadata(file, package)


@functools.lru_cache(maxsize=4096)
def _is_beside_its_metadata(file: str, package: str) -> bool:
    """Whether the package, which the file is in, was installed into a folder of any name (``pip install --target``)."""
    home = next((folder for folder in Path(file).parents if folder.name == package), None)
    return home is not None and any(home.parent.glob("*.dist-info/RECORD"))


def is_class_by_user(kind: type) -> bool:
    """Likewise of a class; one without a module was made by code that is in no file."""
    module = sys.modules.get(str(kind.__module__))
    if module is None or kind.__module__ == "builtins":
        return bool(kind.__flags__ & _WRITTEN_IN_PYTHON)
    return is_by_user(attributes_of_module(module))


def attributes_of_module(module: ModuleType) -> dict[str, Any]:
    """What a Python module has, of a lazy one what it has so far."""
    found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return found
