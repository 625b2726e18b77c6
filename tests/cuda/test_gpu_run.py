"""How benchmarks/gpu.py runs its units: nothing that one of them does may cost another's result. No GPU is needed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from needs import needs_triton

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

#: Answers by the unit's name: some print, some crash, one hangs; it counts the processes it was in a file.
WORKER = """
import json, os, sys, time
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
for line in sys.stdin:
    name = json.loads(line)["name"]
    if name == "crashes":
        os.abort()
    if name == "hangs":
        time.sleep(600)
    if name == "babbles":
        print("not JSON", flush=True)
        continue
    found = {"ok": name != "wrong"}
    if name == "raises":
        found = {"ok": False, "error": "RuntimeError: no luck"}
    if name == "environment":
        found["device"] = os.environ.get("DEVICE", "a device")
    print(json.dumps(found), flush=True)
    if "error" in found:
        break
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    pytest.importorskip("triton")
    return importlib.import_module("gpu")


@pytest.fixture
def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs units of these names in a part of their own, by the worker above; results in tmp_path / gpu.json."""
    worker, started = tmp_path / "worker.py", tmp_path / "started"
    worker.write_text(WORKER)
    monkeypatch.setattr(gpu, "worker_command", lambda: [sys.executable, str(worker), str(started)])
    units_of = importlib.import_module("gpu_units")

    def go(*names: str, workers: int = 1, unit_seconds: float = 30.0, seconds: float = 120.0, **options: Any) -> int:
        parts = [SimpleNamespace(name=n, workers=workers, seconds=unit_seconds, requires=()) for n in ("environment", "own")]
        monkeypatch.setattr(units_of, "PARTS", parts)
        monkeypatch.setattr(units_of, "units", lambda part, dry: ["environment"] if part == "environment" else list(names))
        return gpu.run(["own"], tmp_path / "gpu.json", seconds, **options)

    return go


def found(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "gpu.json").read_text())["own"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unit_that_fails_costs_no_other(
    run: Callable[..., int], tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("right", "crashes", "wrong", "raises", "babbles", "also right")
    assert run(*names, workers=workers) == 1
    results = found(tmp_path)
    assert {name: r["ok"] for name, r in results.items()} == {name: "right" in name for name in names}
    assert "status -6" in results["crashes"]["error"]
    assert results["raises"]["error"] == "RuntimeError: no luck"
    said = capsys.readouterr()
    assert "4 failed: " in said.out
    assert '"ok": true' in said.err  # each result is in the output, too


def test_a_unit_that_hangs_is_ended(run: Callable[..., int], tmp_path: Path) -> None:
    start = time.monotonic()
    assert run("hangs", "right", unit_seconds=1.5) == 1
    assert time.monotonic() - start < 30
    assert "no result within" in found(tmp_path)["hangs"]["error"]
    assert found(tmp_path)["right"] == {"ok": True}


def test_what_the_end_of_the_time_cuts_short_is_left_for_the_next_run(
    run: Callable[..., int], gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_LAST_START", 0.5)
    assert run("right", "hangs", "another", seconds=4) == 0
    assert found(tmp_path) == {"right": {"ok": True}}
    assert "2 left for the next run: own: hangs, own: another" in capsys.readouterr().out
    assert run("right", "another") == 0
    assert set(found(tmp_path)) == {"right", "another"}


def test_runs_are_resumed_and_failures_retried_on_request(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("right", "wrong") == 1
    (tmp_path / "started").unlink()
    assert run("right", "wrong") == 1  # from the file
    assert len((tmp_path / "started").read_text().split()) == 1  # for the environment alone
    path = tmp_path / "gpu.json"
    path.write_text(path.read_text().replace('"wrong"', '"mended"'))
    assert run("right", "mended", retry=True) == 0
    assert found(tmp_path)["mended"] == {"ok": True}


def test_results_of_another_device_are_not_continued(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("right") == 0
    monkeypatch.setenv("DEVICE", "another device")
    assert run("right") == 2
    assert "another device or other versions" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ['{"own": {', "[1]"])
def test_a_damaged_file_is_put_aside(run: Callable[..., int], tmp_path: Path, damage: str) -> None:
    (tmp_path / "gpu.json").write_text(damage)
    assert run("right") == 0
    assert found(tmp_path) == {"right": {"ok": True}}
    (aside,) = tmp_path.glob("gpu.json.damaged-*")
    assert aside.read_text() == damage


def test_a_file_that_cannot_be_written_does_not_end_the_run(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run("right") == 0
    said = capsys.readouterr()
    assert "No space left on device" in said.err
    assert 'own: right: {"ok": true}' in said.err


def test_what_is_wrong_gets_no_time(gpu: ModuleType, tmp_path: Path) -> None:
    from gpu_results import Results

    results = Results(tmp_path / "gpu.json")
    assert "not checked" in gpu._not_to_be_timed(results, "models", "resnet50 restructured")
    assert gpu._not_to_be_timed(results, "models", "resnet50 eager") is None
    results.put("steps", "resnet50", {"ok": False})
    assert gpu._not_to_be_timed(results, "models", "resnet50 restructured graphed") is not None
    results.put("steps", "resnet50", {"ok": True})
    assert gpu._not_to_be_timed(results, "models", "resnet50 restructured graphed") is None
    assert "ceilings" in gpu._not_to_be_timed(results, "kernels", "a node")
    results.put("ceilings", "ceilings", {"ok": True})
    assert gpu._not_to_be_timed(results, "kernels", "a node") is not None
    results.put("check", "bfloat16 a node", {"ok": True})
    assert gpu._not_to_be_timed(results, "kernels", "a node") is None


def test_every_unit_of_a_real_run_has_a_name_of_its_own(gpu: ModuleType) -> None:
    from gpu_units import PARTS, units

    assert {requirement for part in PARTS for requirement in part.requires} <= {part.name for part in PARTS}
    for part in PARTS:
        names = units(part.name, dry=False)
        assert names
        assert len(set(names)) == len(names)
    assert set(units("kernels", False)) <= {name.partition(" ")[2] for name in units("check", False)}


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments], env=os.environ | variables, capture_output=True, text=True, cwd="/"
    )  # fmt: skip


@needs_triton
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    said = script("--results", str(tmp_path / "gpu.json"), CUDA_VISIBLE_DEVICES="")
    assert said.returncode == 2
    assert "cannot run here: no CUDA device" in said.stderr.splitlines()[-1]


@needs_triton
def test_a_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    said = script("--dry-run", "--results", str(tmp_path / "gpu.json"))
    assert said.returncode == 0, said.stderr[-3000:] + (tmp_path / "gpu.log").read_text()[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert set(results) == {
        "environment", "ceilings", "check", "steps", "warm", "models", "kernels", "models of batch 64", "largest batch",
    }  # fmt: skip
    assert all(r["ok"] for part, units in results.items() if part != "environment" for r in units.values())
    assert "the times below mean nothing" in said.stdout
