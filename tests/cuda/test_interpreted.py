"""Runs the folder interpreted/ in a process of its own: triton is imported interpreting or compiling, never both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from needs import needs_triton

FOLDER = Path(__file__).parent / "interpreted"


@needs_triton
def test_the_interpreted_tests_pass() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", str(FOLDER), "--tb=short", "--durations=5", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-8000:]
