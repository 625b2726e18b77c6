"""What benchmarks/gpu makes of its numbers: no ratio without all rivals, no bound that can be beaten, losses like eager's."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

NAMES = ("schedule", "summary", "models", "kernels", "nodes")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    pytest.importorskip("triton")
    return {name: importlib.import_module(f"benchmarks.gpu.{name}") for name in NAMES}


@pytest.fixture
def timed(gpu: dict[str, ModuleType]) -> dict[str, Any]:
    """All variants of densenet121: torch.compile in 10 ms and 8 GiB, ours in 5 ms and 2 GiB, all others slower."""
    found = {}
    for variant in gpu["schedule"].VARIANTS:
        step, memory = {"compile": (10.0, 8), "restructured graphed": (5.0, 4), "restructured": (9.0, 3)}.get(variant, (20.0, 20))
        found[f"densenet121 {variant}"] = {
            "ok": True, "step": step, "allocated": memory * 2**30, "before": 2**30, "reserved": 99 * 2**30, "compared": True,
        }  # fmt: skip
    return found


def lines(gpu: dict[str, ModuleType], timed: dict[str, Any]) -> str:
    return "\n".join(gpu["summary"].compare_models("models", timed))


def test_the_fastest_rival_and_the_memory_without_graphs(gpu: dict[str, ModuleType], timed: dict[str, Any]) -> None:
    said = lines(gpu, timed)
    assert "compile 10.00 ms, restructured graphed 5.00 ms, 2.00x" in said
    assert "peak memory of torch.compile 7.00 GiB, of ours 2.00 GiB, 0.29x (goal: at most 0.35x)" in said
    timed["densenet121 restructured graphed"]["compared"] = False
    assert "losses not compared" in lines(gpu, timed)


@pytest.mark.parametrize("lost", [None, {"ok": False, "error": "no result within 300 s"}], ids=["missing", "failed"])
def test_no_ratio_without_every_rival(gpu: dict[str, ModuleType], timed: dict[str, Any], lost: dict[str, Any] | None) -> None:
    del timed["densenet121 compile captured"]
    if lost is not None:
        timed["densenet121 compile captured"] = lost
    said = lines(gpu, timed)
    assert "no ratio: incomplete without compile captured" in said
    assert "2.00x" not in said


def test_a_rival_that_ran_out_of_memory_is_no_rival(gpu: dict[str, ModuleType], timed: dict[str, Any]) -> None:
    timed["densenet121 compile"] = {"ok": True, "step": None, "reason": "out of memory"}
    said = lines(gpu, timed)
    assert "restructured graphed 5.00 ms, 4.00x" in said
    assert "compile: out of memory" in said
    assert "peak memory" not in said


def test_graphs_that_were_not_used_are_told_of(gpu: dict[str, ModuleType], timed: dict[str, Any]) -> None:
    timed["densenet121 compile graphed"]["cudagraph_skips"] = 3
    assert "its CUDA graphs skipped 3 times" in lines(gpu, timed)


def test_kernels_timed_with_their_launches_are_marked(gpu: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    known = {"rule": "fused", "bound": 1.0, "share": 0.5}
    node: dict[str, Any] = {f"{way}_{what}": value for way in ("forward", "backward") for what, value in known.items()}
    node |= {"ok": True, "fused_forward": 2.0, "fused_backward": 3.0, "not_captured": {"fused_backward": "RuntimeError: no"}}
    swept = {"ok": True, "times": {"normalise_forward": 4.0, "finalize_forward": 1.0}, "bounds": {"normalise_forward": 1.0}}
    gpu["summary"].summarise({"kernels": {"a node": node, "sweeps relu 4 5": swept, "wrong": {"ok": False}}}, set())
    said = capsys.readouterr().out
    assert "fused 2.000 (rule" in said
    assert "fused 3.000* (rule" in said
    assert "* with its launches from Python, as it could not be captured: RuntimeError: no" in said
    assert "normalise_forward 4.000 (bound 1.000); finalize_forward 1.000\n" in said
    assert "furthest from its roofline: sweeps relu 4 5: normalise_forward, 25%" in said


def test_what_trains_otherwise_than_eager_is_found(gpu: dict[str, ModuleType]) -> None:
    alike = gpu["models"].trains_alike
    eager = [7.12, 5.65, 4.72, 4.07]
    assert alike([7.121, 5.66, 4.70, 4.10, 3.0], eager, 0.001) is None
    assert alike([7.121, 5.66], None, None) is None
    assert "step 0" in alike([7.17, 5.65, 4.72, 4.07], eager, None)  # another forward pass
    assert "step 1" in alike([7.12, 7.12, 7.12, 7.12], eager, None)  # a replay that trains nothing
    assert "replay" in alike(eager, eager, 0.5)
    assert "replay" in alike(eager, eager, float("nan"))
    assert "not finite" in alike([*eager, float("nan")], eager, None)


def test_too_little_memory_is_recognised_in_all_its_words(gpu: dict[str, ModuleType]) -> None:
    recognised = gpu["kernels"].is_out_of_memory
    for error in (
        torch.OutOfMemoryError("x"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ):
        assert recognised(error), error
    wrapped = ValueError("the model fails on these inputs")
    wrapped.__cause__ = torch.OutOfMemoryError("x")
    assert recognised(wrapped)
    assert not recognised(RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"))
    assert not gpu["kernels"].no_convolution_found(RuntimeError("an illegal memory access was encountered"))
    assert gpu["kernels"].no_convolution_found(RuntimeError("GET was unable to find an engine to execute this computation"))


def test_a_bound_counts_each_byte_once(gpu: dict[str, ModuleType]) -> None:
    ceilings = {"bytes": 1e3, "flops": float("inf")}
    node = gpu["nodes"].Node("a node", 3, 5, 7)
    x, y = 2 * 11 * 3 * 49, 2 * 11 * 5 * 49
    bounds = gpu["kernels"].bounds(node, 11, ceilings)
    assert bounds["forward_bound"] == pytest.approx(x + y)
    assert bounds["backward_bound"] == pytest.approx(2 * y + 3 * x)
    assert bounds["backward_two_pass_bound"] == pytest.approx(4 * y + 4 * x)
    flops = 2 * 11 * 5 * 49 * 3
    bounds = gpu["kernels"].bounds(node, 11, {"bytes": float("inf"), "flops": 1e3})
    assert (bounds["forward_bound"], bounds["backward_bound"]) == (pytest.approx(flops), pytest.approx(2 * flops))
