"""How much a training step gives a GPU to do, counted on meta tensors: kernels and small operations may not grow in number."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from needs import needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize(("model", "kernels", "operations"), [("densenet121", 913, 1760), ("resnet50", 410, 639)])
def test_a_step_launches_no_more_than_it_did(model: str, kernels: int, operations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    record = importlib.import_module("benchmarks.cuda_code.record")
    step = record.record(record.prepared(model), batch=64)
    assert 0 < len(step.launches) <= kernels
    assert 0 < sum(step.operations.values()) <= operations
    assert 0 < step.forward < len(step.launches)
