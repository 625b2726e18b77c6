"""The how-tos of examples/integrations run and say what they claim. Those that need another library are ``make integrations``."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

HOW_TO = Path(__file__).parent.parent / "examples" / "integrations"

#: Script -> what its last words must match.
PLAIN = {
    "autocast": r"Sequential: equivalent, \d+ tensors compared, 0 beyond limits",
    "checkpoints": r"uninterrupted: +loss (\S+)\nresumed, restructured: +loss \1\nresumed, without the package: +loss (\S+)",
    "compile_backend": r"5 BN layers, 4 fused",
    "ddp": r"rank 0 of 1: loss \d\.\d+, parameters add up to -?\d+\.\d+",
    "ema": r"right on (6|7|8|9|100)\d*%",
    "export": r"outputs equal: True",
    "fine_tuning": r"3 x frozen: it is in eval mode.*\nchanged by training: the parts 2, 3\n$",
    "fsdp2": r"5 BN layers, 4 fused",
    "gradient_accumulation": r"parameters are (\de-0[4-9]|0e\+00) apart",
    "memory": r"eager channels_last +keeps (?P<eager>\S+) MB for backward\nrestructured +keeps (?P<ours>\S+) MB",
    "torchvision_loop": r"34 BN layers, 34 fused(.*\n)+epoch 1: loss \d",
}
WITH_A_LIBRARY = {
    "accelerate_loop": ("accelerate", r"loss \d\.\d+\n.*5 BN layers, 4 fused"),
    "lightning_callback": ("lightning", r"4 fused(.*\n)+loss \d\.\d+; after fitting it is a plain Sequential again"),
    "timm_train": ("timm", r"14 BN layers, 14 fused"),
    "trainer_transformers": ("transformers", r"loss \d\.\d+\nsaved and loaded as ResNetForImageClassification"),
}


@pytest.fixture
def said_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[str], str]:
    """Runs a script in this process and gives what it prints: importing torch takes longer than most of them."""
    monkeypatch.syspath_prepend(str(HOW_TO))
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name])
        with mock.patch.dict(os.environ):  # a process group's variables
            runpy.run_path(str(HOW_TO / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def said_by(name: str, tmp_path: Path, *launcher: str) -> str:
    """What a script prints, run as a user runs it: with one thread, from elsewhere."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, *launcher, str(HOW_TO / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_how_to_is_tested() -> None:
    assert {path.stem for path in HOW_TO.glob("*.py")} == {*PLAIN, *WITH_A_LIBRARY, "tiny"}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_how_to(name: str, said_here: Callable[[str], str]) -> None:
    if name == "memory":
        pytest.importorskip("matplotlib").use("agg")
    said = said_here(name)
    found = re.search(PLAIN[name], said)
    assert found is not None, said
    if name == "memory":
        assert float(found["ours"]) < 0.5 * float(found["eager"])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.whole), "fsdp2"])
def test_how_to_with_two_processes(name: str, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    said = said_by(name, tmp_path, *launcher)
    if name == "fsdp2":
        assert said.startswith("2 rank(s), loss ")
        return
    totals = re.findall(r"rank [01] of 2: loss \d\.\d+, parameters add up to (-?\d+\.\d{9})", said)
    assert len(totals) == 2, said
    assert len(set(totals)) == 1, said


@pytest.mark.integrations
@pytest.mark.parametrize("name", WITH_A_LIBRARY)
def test_how_to_with_a_library(name: str, tmp_path: Path) -> None:
    """No skipping here: ``make integrations`` installs what they need."""
    _, words = WITH_A_LIBRARY[name]
    said = said_by(name, tmp_path)
    assert re.search(words, said), said
