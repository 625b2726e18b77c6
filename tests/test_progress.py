"""What a command says while it works: bars with steps done and to come on a terminal, nothing in a pipe."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from bnrestructure.cli.output import Steps
from bnrestructure.core.progress import expect, listening, tell

MODEL = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "watched.py").write_text(MODEL)
    return f"{tmp_path / 'watched.py'}:net"


def test_a_bar_counts_steps_done_and_to_come() -> None:
    bar = Progress(console=Console(file=io.StringIO()))
    steps = Steps("model", bar)

    def seen() -> tuple[float, float | None, str]:
        (task,) = bar.tasks
        return task.completed, task.total, task.fields["words"]

    steps("building")
    assert seen() == (0, 1, "building")
    steps.expect(3)
    assert seen() == (0, 4, "building")
    steps("training")
    assert seen() == (1, 4, "training")
    steps.expect(5)  # more than was thought
    assert seen() == (1, 7, "training")
    for _ in range(6):  # one that nobody expected
        steps("more")
    assert seen() == (7, 8, "more")


def test_only_who_listens_is_told() -> None:
    told: list[object] = []
    tell("nobody hears this")
    expect(3)
    with listening(told.append, told.append):
        tell("a step")
        expect(2)
    tell("nobody hears this")
    assert told == ["a step", 2]


@pytest.mark.whole
@pytest.mark.parametrize("command", [("plan",), ("verify", "--steps", "1")])
def test_nothing_of_it_in_pipes_and_all_of_it_on_a_terminal(command: tuple[str, ...], model: str) -> None:
    name, *options = command
    words = [sys.executable, "-m", "bnrestructure.cli.main", name, model, "--backend", "reference", "--batch", "2", "--input-size", "8"]
    piped = subprocess.run([*words, *options, "--json"], capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    assert piped.stdout.startswith("{")
    ours, theirs = pty.openpty()
    terminal = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    with subprocess.Popen([*words, *options], stdout=subprocess.DEVNULL, stderr=theirs, env=terminal) as process:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 4096):
                seen += chunk
        except OSError:  # the terminal's other end has gone
            pass
        os.close(ours)
        assert process.wait() == 0
    shown = seen.decode()
    assert {"plan": "2/3", "verify": "6/7"}[name] in shown  # the last step goes on as the bar is taken away
