"""The checking half of benchmarks/gpu.py, interpreted: it lets right numbers pass and wrong ones not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bnrestructure.kernels import cuda


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    return importlib.import_module("gpu")


@pytest.fixture
def nodes(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_nodes")


@pytest.mark.parametrize("gated", [False, True])
def test_a_right_kernel_passes(nodes: ModuleType, gated: bool) -> None:
    node = nodes.Node("tiny", 5, 4, 5, act="silu", gated=gated)
    assert nodes.check_node(node, torch.bfloat16, "cpu", batch=2)["ok"]


@pytest.mark.own_tiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_right_sweeps_pass(nodes: ModuleType, dtype: torch.dtype) -> None:
    found = nodes.check_sweeps("silu", dtype, "cpu", shape=(2, 5, 6, 5))
    assert found["ok"], found


def test_a_wrong_kernel_does_not(nodes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda.conv_forward

    def wrong(*args: Any, **options: Any) -> Any:
        y, mean, var = right(*args, **options)
        return y, mean, var * 1.01

    monkeypatch.setattr(cuda, "conv_forward", wrong, raising=False)
    assert not nodes.check_node(nodes.Node("tiny", 5, 4, 5), torch.float32, "cpu", batch=2)["ok"]


def test_runs_are_resumed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second run does only what the first had no time for; a failure is an exit status of 1 every time."""
    done: list[str] = []

    def units() -> Any:
        for name in ("a", "b"):
            yield name, lambda name=name: done.append(name) or {"ok": name == "a"}

    monkeypatch.setattr(gpu, "parts", lambda found: {"check": units})
    monkeypatch.setattr(gpu, "environment", lambda: {"device": "none"})
    path = tmp_path / "gpu.json"
    assert gpu.run(["check"], path, seconds=-1) == 0
    assert done == []
    assert gpu.run(["check"], path, seconds=60) == 1
    assert gpu.run(["check"], path, seconds=60) == 1
    assert done == ["a", "b"]
    assert json.loads(path.read_text())["check"]["b"] == {"ok": False}
    monkeypatch.setattr(gpu, "environment", lambda: {"device": "another"})
    assert gpu.run(["check"], path, seconds=60) == 2


def test_without_a_gpu_it_says_so(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "no CUDA device")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
