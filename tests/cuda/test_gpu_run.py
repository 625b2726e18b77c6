"""How benchmarks/gpu runs its units: nothing that one of them does may cost another's result. No GPU is needed."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

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
    if name == "net short of memory":
        found = {"ok": False, "reason": "out of memory"}
    if name == "variable":
        found["value"] = os.environ["A_VARIABLE"]
    if name == "environment":
        found["device"] = os.environ.get("DEVICE", "a device")
    print(json.dumps(found), flush=True)
    if "error" in found:
        break
"""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.gpu.run")


@pytest.fixture
def work(runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs units of these parts, all made by the worker above; results in tmp_path / gpu.json."""
    worker, started = tmp_path / "worker.py", tmp_path / "started"
    worker.write_text(WORKER)
    monkeypatch.setattr(runs, "worker_command", lambda: [sys.executable, str(worker), str(started)])

    def go(order: list[tuple[str, list[str]]], seconds: float = 120.0, **options: Any) -> int:
        monkeypatch.setattr(runs, "schedule", lambda dry: [("environment", ["environment"]), *order])
        return runs.run([part for part, _ in order], tmp_path / "gpu.json", seconds, **options)

    return go


@pytest.fixture
def run(work: Callable[..., int], runs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The same for units of these names in a part of their own, with as many processors as it needs."""
    monkeypatch.setattr(runs, "_CORES", 16)

    def go(*names: str, workers: int = 1, unit_seconds: float = 30.0, **options: Any) -> int:
        schedule = importlib.import_module("benchmarks.gpu.schedule")
        monkeypatch.setitem(runs.PARTS, "own", schedule.Part(workers, unit_seconds))
        return work([("own", list(names))], **options)

    return go


def found(tmp_path: Path, part: str = "own") -> dict[str, Any]:
    return json.loads((tmp_path / "gpu.json").read_text()).get(part, {})


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
    run: Callable[..., int], runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "_LAST_START", 0.5)
    assert run("right", "hangs", "another", seconds=4) == 0
    assert found(tmp_path) == {"right": {"ok": True}}
    assert "2 left for the next run: own: hangs, own: another" in capsys.readouterr().out
    assert run("right", "another") == 0
    assert set(found(tmp_path)) == {"right", "another"}


def test_a_failure_beside_others_is_no_result_if_there_is_no_time_to_try_alone(
    run: Callable[..., int], runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "_LAST_START", 0.5)
    assert run("raises", "hangs", workers=2, seconds=4) == 0
    assert found(tmp_path) == {}
    assert "2 left for the next run: own: hangs, own: raises" in capsys.readouterr().out
    assert run("raises", workers=2) == 1
    assert found(tmp_path)["raises"]["error"] == "RuntimeError: no luck"


def test_workers_live_on_where_nothing_is_to_be_done(
    work: Callable[..., int], runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runs, "_CORES", 8)
    assert work([("steps", ["net"]), ("models", ["net restructured", "net restructured repeated", "net restructured graphed"])]) == 0
    (tmp_path / "started").unlink()
    assert work([("models", ["net eager"]), ("warm", ["net restructured"]), ("models", ["net compile"])]) == 0
    assert len((tmp_path / "started").read_text().split()) == 1


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


MODELS = [("steps", ["net"]), ("warm", ["net restructured"]), ("models", ["net eager", "net restructured"])]


def test_a_run_cut_in_the_checks_does_not_spoil_the_next(
    work: Callable[..., int], runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "_LAST_START", 0.5)
    order = [("steps", ["hangs"]), ("models", ["hangs eager", "hangs restructured"])]
    assert work(order, seconds=4) == 0
    assert "3 left for the next run: steps: hangs, models: hangs restructured, models: hangs eager" in capsys.readouterr().out
    assert found(tmp_path, "models") == {}
    results = runs.Results(tmp_path / "gpu.json")
    results.put("steps", "hangs", {"ok": True, "sources": runs.facts()["sources"]})
    assert work(order) == 0
    assert {name: r["ok"] for name, r in found(tmp_path, "models").items()} == {"hangs eager": True, "hangs restructured": True}


def test_what_is_wrong_gets_no_time_until_it_is_mended(
    work: Callable[..., int], runs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = runs.Results(tmp_path / "gpu.json")
    ours = {"sources": runs.facts()["sources"]}
    results.is_of({"device": "a device"})
    results.put("steps", "net", {"ok": False, **ours})
    results.put("models", "net restructured", {"ok": True, "step": 1.0, **ours})  # timed before its numbers were known to be wrong
    assert work(MODELS) == 1
    timed = found(tmp_path, "models")
    assert timed["net eager"]["ok"]
    assert timed["net restructured"]["refused"]
    assert "numbers are wrong" in capsys.readouterr().out
    results = runs.Results(tmp_path / "gpu.json")
    results.put("steps", "net", {"ok": True, **ours})
    assert work(MODELS) == 0
    assert found(tmp_path, "models")["net restructured"] == {"ok": True, **ours}


def test_our_results_of_other_sources_are_taken_anew_and_the_rivals_stay(
    work: Callable[..., int], runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert work(MODELS) == 0
    first = found(tmp_path, "models")
    monkeypatch.setattr(runs, "facts", lambda: {"sources": "others", "commit": "another"})
    kept = ("models", "net eager")
    results = runs.Results(tmp_path / "gpu.json")
    results.put(*kept, first["net eager"] | {"mark": 7})
    assert work(MODELS) == 0
    assert found(tmp_path, "models")["net eager"]["mark"] == 7
    assert found(tmp_path, "models")["net restructured"]["sources"] == found(tmp_path, "steps")["net"]["sources"] == "others"
    assert [r["sources"] for r in json.loads((tmp_path / "gpu.json").read_text())["runs"]] == [
        first["net restructured"]["sources"], "others",
    ]  # fmt: skip


def test_a_result_of_other_sources_proves_nothing_and_is_not_shown(
    work: Callable[..., int], runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert work(MODELS) == 0
    assert "net" in capsys.readouterr().out.partition("results:")[0]
    monkeypatch.setattr(runs, "facts", lambda: {"sources": "others"})
    assert work(MODELS, seconds=0) == 0
    said = capsys.readouterr().out
    assert "restructured: failed" not in said
    assert "left for the next run: steps: net, models: net restructured" in said


def test_warming_is_never_kept_and_not_done_for_what_is_timed(work: Callable[..., int], tmp_path: Path) -> None:
    def warmed() -> bool:
        return "warm: net restructured" in (tmp_path / "said").read_text()

    for expected in (True, False):
        (tmp_path / "said").write_text("")
        with (tmp_path / "said").open("w") as said, contextlib.redirect_stderr(said):
            assert work([*MODELS[:2], ("models", ["net restructured", "net restructured repeated", "net restructured graphed"])]) == 0
        assert warmed() is expected
        assert found(tmp_path, "warm") == {}


def test_what_ran_out_of_memory_beside_others_is_compiled_again_alone(
    work: Callable[..., int], runs: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "_CORES", 8)
    monkeypatch.setattr(runs, "served_by", lambda part, name: [("models", name)])
    assert work([("warm", ["net short of memory", "net wrong", "wrong"])]) == 0
    said = capsys.readouterr().err
    assert said.count("warm: net short of memory") == 2
    assert said.count("warm: wrong") == 1


def test_a_worker_of_another_environment_is_not_used_again(runs: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "started")]
    pool = runs.Pool(command, {}, tmp_path / "log", time.monotonic() + 60)
    said: list[str] = []
    for value in ("one", "two", "two"):
        pool.run([{"name": "variable"}], 1, 30, time.monotonic() + 30, lambda _, r: said.append(r["value"]), A_VARIABLE=value)
    pool.close()
    assert said == ["one", "two", "two"]
    assert len((tmp_path / "started").read_text().split()) == 2


def test_results_are_standard_json(runs: ModuleType, tmp_path: Path) -> None:
    runs.Results(tmp_path / "gpu.json").put("check", "a node", {"ok": False, "errors": [float("inf"), (float("nan"), -1.0)]})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    read = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=refuse)
    assert read["check"]["a node"]["errors"] == ["infinite", ["not a number", -1.0]]
