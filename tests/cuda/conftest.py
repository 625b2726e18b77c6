"""What the tests of benchmarks/gpu have in common."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of benchmarks/gpu, by name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    pytest.importorskip("triton")
    return lambda name: importlib.import_module(f"benchmarks.gpu.{name}")
