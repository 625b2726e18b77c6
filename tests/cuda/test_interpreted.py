"""Runs the folder interpreted/ in a process of its own: triton is imported interpreting or compiling, never both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs_triton

FOLDER = Path(__file__).parent / "interpreted"


@needs_triton
@pytest.mark.parametrize("model", [None, "resnet18", "densenet121"])
def test_the_interpreted_tests_pass(model: str | None) -> None:
    """The kernels one by one, and whole models through one training step, each in a process of its own."""
    only = [] if model is None else ["-m", "whole", "-k", model]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", str(FOLDER), "--tb=short", "--durations=5", "-p", "no:cacheprovider", *only],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-8000:]
    if model is not None:
        assert "1 passed" in found.stdout
