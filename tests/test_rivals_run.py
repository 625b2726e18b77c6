"""benchmarks/rivals: workers take turns, ratios are paired by round, and a worker that dies says why. Frameworks are stood in for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "rivals"))

import run as rivals

RIVALS = Path(rivals.__file__).parent

WORKER = f"""
import sys, time
sys.path.insert(0, {str(RIVALS)!r})
from protocol import arguments, serve

options = arguments()
calls = 0

def step():
    global calls
    calls += 1
    with open(options.model, "a") as log:
        log.write(options.variant[0])
    if options.variant == "dies" and calls == 2:
        raise ArithmeticError("no more")
    print("a framework's chatter")
    time.sleep(0.02 if options.variant == "slow" else 0.01)
    held.append(b"x" * 10_000_000)
    return 6.9

held = []
serve(step, {{"fake": "1"}})
"""


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    (tmp_path / "worker.py").write_text(WORKER)
    contenders = {name: (sys.executable, "worker.py", name) for name in ("slow", "quick", "dies")}
    monkeypatch.setattr(rivals, "CONTENDERS", contenders)
    monkeypatch.setattr(rivals, "HERE", tmp_path)
    return argparse.Namespace(batch=2, size=8, dtype="fp32", threads=1, rounds=3, warmup=1, contenders=["slow", "quick"])


def test_workers_take_turns(options: argparse.Namespace, tmp_path: Path) -> None:
    found = rivals.measure(str(tmp_path / "order"), options)
    assert (tmp_path / "order").read_text() == "sqsqsqsq"
    assert [len(result["seconds"]) for result in found.values()] == [3, 3]  # the warm-up is not counted
    assert all(seconds >= 0.02 for seconds in found["slow"]["seconds"])
    assert found["quick"]["versions"] == {"fake": "1"}
    assert found["slow"]["resident_bytes"] >= 30_000_000


def test_ratios_are_paired_and_the_last_is_the_measure(options: argparse.Namespace) -> None:
    found = {
        "slow": {"seconds": [2.0, 6.0, 2.2], "resident_bytes": 5_000_000, "loss": 6.9},
        "quick": {"seconds": [1.0, 3.0, 1.1], "resident_bytes": 4_000_000, "loss": 6.9},
    }
    lines = rivals.table("net", options, found)
    assert lines[0] == "net, batch 2, 8x8, fp32, 1 threads"
    assert lines[4] == "| slow | 2200 | 2.00x | 5 | 6.900 |"
    assert lines[5] == "| quick | 1100 | 1.00x | 4 | 6.900 |"


def test_a_worker_that_dies_says_why(options: argparse.Namespace, tmp_path: Path) -> None:
    options.contenders = ["quick", "dies"]
    with pytest.raises(RuntimeError, match=r"dies ended: (.*\n)+ArithmeticError: no more"):
        rivals.measure(str(tmp_path / "order"), options)


def test_models_and_venvs_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "resnet81"])
    with pytest.raises(SystemExit):
        rivals._options()
    assert "unknown model 'resnet81'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run.py", "resnet50"])
    monkeypatch.setattr(rivals, "CONTENDERS", {"JAX": ("/nowhere/python", "jax_step.py", "")})
    with pytest.raises(SystemExit):
        rivals._options()
    assert "there is no /nowhere/python: run with --set-up first" in capsys.readouterr().err
