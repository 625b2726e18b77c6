"""A fixture: the CPU's kernels as if they had to be proved, with a fault among them, in a cache of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from planted_kernels import KERNELS as PLANTED

from bnrestructure.kernels import tuning
from bnrestructure.kernels.proof.prover import Proved


def proving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Proved]]:
    """As in a new process: ``prove("wrong ConvForward")``, for ``prove = pytest.fixture(proving)``."""
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    tuning.forget()

    def make(planted: str = "", seconds: float = 120.0) -> Proved:
        monkeypatch.setenv("BNR_PLANTED", planted)
        tuning.forget()
        PLANTED.answered.clear()
        PLANTED.chosen.clear()
        return Proved(PLANTED, "planted_kernels", seconds=seconds)  # type: ignore[arg-type]

    yield make
    tuning.forget()
