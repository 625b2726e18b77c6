"""Makes ``bnrestructure`` importable from this checkout where it is not installed: a bare machine without a network."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

__all__ = ["Folders", "make_importable"]

ROOT = Path(__file__).resolve().parent.parent


class Folders:
    """Finds the bnrestructure of one checkout, and the two of its packages that stand at the top (pyproject.toml maps them)."""

    def __init__(self, root: Path) -> None:
        self._packages = {
            "bnrestructure": root / "bnrestructure",
            "bnrestructure.passes": root / "passes",
            "bnrestructure.patterns": root / "patterns",
        }

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """The spec of one of the three, or None."""
        if (folder := self._packages.get(name)) is None:
            return None
        return importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def make_importable() -> None:
    """Does nothing where the package is installed."""
    if importlib.util.find_spec("bnrestructure") is None:
        sys.meta_path.append(Folders(ROOT))
