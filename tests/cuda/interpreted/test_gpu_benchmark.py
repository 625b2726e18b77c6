"""The checking half of benchmarks/gpu, interpreted: it lets right numbers pass and wrong ones not."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bnrestructure.kernels.calls import MaxPoolBackward, NormaliseForward, SqueezeBackward
from bnrestructure.kernels.cuda import KERNELS


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[3])
    return importlib.import_module("benchmarks.gpu.nodes")


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"joined": True}, {"joined": True, "kernel": 3}], ids=str)
def test_a_right_kernel_passes(nodes: ModuleType, options: dict[str, Any]) -> None:
    node = nodes.Node("tiny", 5, 4, 5, act="silu", **options)
    found = nodes.check_node(node, torch.bfloat16, "cpu", batch=2)
    assert found["ok"], found


@pytest.mark.own_tiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_right_sweeps_pass(nodes: ModuleType, dtype: torch.dtype) -> None:
    found = importlib.import_module("benchmarks.gpu.kernels").check_sweeps("silu", dtype, "cpu", shape=(2, 5, 6, 5))
    assert found["ok"], found


@pytest.mark.parametrize("name", ["fused", "hybrid"])
def test_a_wrong_kernel_does_not(nodes: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    implementation = KERNELS.convolutions.implementations[name]
    right = implementation.forward

    def wrong(call: Any, site: Any) -> Any:
        found = right(call, site)
        return found._replace(var=found.var * 1.01)

    monkeypatch.setattr(implementation, "forward", wrong)
    for joined in (False, True):
        assert not nodes.check_node(nodes.Node("tiny", 5, 4, 5, joined=joined), torch.float32, "cpu", batch=2)["ok"]


@pytest.mark.own_tiles
@pytest.mark.parametrize("kind", [NormaliseForward, MaxPoolBackward, SqueezeBackward])
def test_a_wrong_sweep_does_not(nodes: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    right = KERNELS._sweeps[kind]

    def wrong(call: Any) -> Any:
        found = right(call)
        return found * 1.1 if isinstance(found, torch.Tensor) else found._replace(dx=found.dx * 1.1)

    monkeypatch.setitem(KERNELS._sweeps, kind, wrong)
    assert not importlib.import_module("benchmarks.gpu.kernels").check_sweeps("silu", torch.float32, "cpu", shape=(2, 5, 6, 5))["ok"]


@pytest.mark.own_tiles
def test_each_sweep_is_timed_against_its_bytes(nodes: ModuleType) -> None:
    shape = (2, 4, 5, 6)
    found = importlib.import_module("benchmarks.gpu.kernels").time_sweeps("relu", shape, {"bytes": 1e3}, "cpu")
    full, vector = 2 * 2 * 4 * 5 * 6, 4 * 4
    assert found["bounds"]["statistics_forward"] == full + 2 * vector
    assert found["bounds"]["normalise_backward"] == 4 * full + 2 * vector  # dz, x and what is added to; dx; two sums
    assert found["bounds"]["max_pool_forward"] == full + 3 * 2 * 4 * 3 * 3  # the maxima in two bytes, their places in one
    assert set(found["times"]) - set(found["bounds"]) == {"finalize_forward", "finalize_backward"}
