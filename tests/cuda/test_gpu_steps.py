"""What benchmarks/gpu keeps apart: too little memory and errors, one unit's settings and the next, old sources and new."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def fails_with(monkeypatch: pytest.MonkeyPatch, steps: ModuleType, error: Callable[[int], Exception | None]) -> list[int]:
    """Preparing a step of a batch raises what ``error`` says of it; the batches that were asked for."""
    asked: list[int] = []

    def prepared(name: str, batch: int, *_: Any) -> Any:
        asked.append(batch)
        if (raised := error(batch)) is not None:
            raise raised
        return None, {}

    monkeypatch.setattr(steps, "_prepared", prepared)
    return asked


def test_too_little_memory_is_a_result_and_an_error_is_not(gpu: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = gpu("models")
    fails_with(monkeypatch, steps, lambda batch: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert steps.time_model("tiny", 2, "eager", device="cpu") == {"ok": True, "step": None, "reason": "out of memory"}
    fails_with(monkeypatch, steps, lambda batch: RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        steps.time_model("tiny", 2, "eager", device="cpu")


@pytest.mark.parametrize("words", ["Triton Error [CUDA]: out of memory", "GET was unable to find an engine to execute this computation"])
def test_the_largest_batch_is_found_in_quarters(
    gpu: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    steps = gpu("models")
    asked = fails_with(monkeypatch, steps, lambda batch: RuntimeError(words) if batch > 13 else None)
    assert steps.largest_batch("tiny", "eager", "cpu") == {"ok": True, "batch": 12}
    assert asked == [2, 4, 8, 16, 14, 12]
    fails_with(monkeypatch, steps, lambda batch: RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        steps.largest_batch("tiny", "eager", "cpu")


def test_a_unit_leaves_no_settings_behind(gpu: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = gpu("models")
    seen: list[tuple[str, bool]] = []

    def look(batch: int) -> Exception:
        seen.append((os.environ["BNRESTRUCTURE_CACHE"], torch.backends.cudnn.benchmark))
        return torch.OutOfMemoryError("whatever happens")

    fails_with(monkeypatch, steps, look)
    for before in ("the user's", None):
        monkeypatch.delenv("BNRESTRUCTURE_CACHE", raising=False)
        if before is not None:
            monkeypatch.setenv("BNRESTRUCTURE_CACHE", before)
        for variant in ("restructured tuned graphed", "restructured"):
            steps.time_model("tiny", 2, variant, device="cpu", choices=tmp_path)
            assert os.environ.get("BNRESTRUCTURE_CACHE") == before
    assert seen == [(str(tmp_path), True), ("off", True)] * 2
    assert not torch.backends.cudnn.benchmark


def test_the_digest_is_of_what_a_step_runs(gpu: Callable[[str], ModuleType], tmp_path: Path) -> None:
    digest = gpu("results").sources_digest
    found = [digest(tmp_path)]
    for name in ("bnrestructure/kernels/cuda/a.py", "passes/a.py", "bnrestructure/kernels/cpu/a.py", "bnrestructure/cli/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        found.append(digest(tmp_path))
    assert len(set(found)) == 3
    assert found[2] == found[3] == found[4]
    (tmp_path / "passes/a.py").write_text("2")
    assert digest(tmp_path) not in found
    assert digest() == digest()
