"""The order of benchmarks/gpu, and the command itself, without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from needs import needs_triton

ROOT = Path(__file__).parents[2]


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.gpu.schedule")


def test_the_order_is_that_of_what_is_worth_most(schedule: ModuleType) -> None:
    order = [(part, name) for part, names in schedule.schedule(False) for name in names]
    place = {unit: number for number, unit in enumerate(order)}
    in_turn = [
        ("steps", "densenet121"),
        ("warm", "densenet121 compile"),
        ("models", "densenet121 restructured tuned graphed"),
        ("warm", "resnet50 compile"),
        ("models", "efficientnet_b0 restructured tuned graphed"),
        ("check", "bfloat16 sweeps gelu"),
        ("kernels", "resnet 3x3 64->64 56"),
        ("check", "float16 sweeps gelu"),
        ("models", "densenet201 restructured"),
        ("warm batch 64", "densenet121 compile"),
        ("models of batch 64", "densenet121 compile"),
        ("largest batch", "densenet121 restructured"),
    ]
    assert [place[unit] for unit in in_turn] == sorted(place[unit] for unit in in_turn)


def test_eager_is_done_before_others_are_asked_to_train_like_it(schedule: ModuleType) -> None:
    done = set()
    for part, names in schedule.schedule(False):
        if part in schedule.BATCHES:
            models = {name.partition(" ")[0] for name in names if not name.endswith(" eager")}
            assert {(part, f"{model} eager") for model in models} <= done
        done |= {(part, name) for name in names}


def test_units_come_after_what_proves_them_and_have_names_of_their_own(schedule: ModuleType) -> None:
    order = [(part, name) for part, names in schedule.schedule(False) for name in names]
    assert len(set(order)) == len(order)
    assert {part for part, _ in order} == set(schedule.PARTS)
    for number, unit in enumerate(order):
        assert set(schedule.proof_of(*unit)) <= set(order[:number]), unit
        assert unit[0] != "kernels" or len(schedule.proof_of(*unit)) == 2
    for part in schedule.WARMED:
        served = [unit for name in schedule.units(part, False) if name.startswith("resnet50") for unit in schedule.served_by(part, name)]
        assert {name.partition(" ")[2] for _, name in served} == {v for v in schedule.VARIANTS if not v.startswith("eager")}


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu"), *arguments], env=os.environ | variables, capture_output=True, text=True, cwd="/"
    )  # fmt: skip


@needs_triton
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    said = script("--results", str(tmp_path / "gpu.json"), CUDA_VISIBLE_DEVICES="")
    assert said.returncode == 2
    assert "cannot run here: no CUDA device" in said.stderr.splitlines()[-1]


@pytest.mark.whole
@needs_triton
def test_a_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    said = script("--dry-run", "--results", str(tmp_path / "gpu.json"))
    assert said.returncode == 0, said.stderr[-3000:] + (tmp_path / "gpu.log").read_text()[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert set(results) == {
        "environment", "runs", "ceilings", "check", "steps", "models", "kernels", "models of batch 64", "largest batch",
    }  # fmt: skip
    assert all(r["ok"] for part, units in results.items() if part not in ("environment", "runs") for r in units.values())
    assert all(r["compared"] for name, r in results["models"].items() if name != "tiny eager")  # with eager's losses
    assert "the times below mean nothing" in said.stdout
