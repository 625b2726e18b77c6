"""Runs the folder interpreted/ in a process of its own: triton is imported interpreting or compiling, never both."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


# PyTorch for macOS and Windows comes without Triton.
@pytest.mark.skipif(util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreted_tests_pass() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", str(FOLDER), "--tb=short", "--durations=5", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-8000:]
