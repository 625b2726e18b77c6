"""Runs tests one by one in a process whose Triton interprets, for a pytest whose Triton compiles: the mode is fixed at import.

As a script it is that process: it collects this folder, reads a test's name a line from its input, and writes the test's reports as one
line of JSON. :class:`InterpretingProcess` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

__all__ = ["InterpretingProcess"]

FOLDER = Path(__file__).resolve().parent


class InterpretingProcess:
    """Started when it is first asked for a test, and again after one that brought it down."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, name: str) -> list[dict[str, Any]]:
        """The test's reports, as pytest serialises them. Raises RuntimeError where the process ended instead."""
        if self._process is None:
            environment = os.environ | {"TRITON_INTERPRET": "1"}
            self._process = subprocess.Popen(
                [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._process = None
            raise RuntimeError(f"the interpreting process ended with status {status} while it ran {name}")
        found: list[dict[str, Any]] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None


class _OneByOne:
    """The plugin of the other process."""

    def __init__(self, names: IO[str], answers: IO[str]) -> None:
        self.names, self.answers = names, answers
        self.reports: list[pytest.TestReport] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid.rpartition("/")[2]: item for item in session.items}
        for line in self.names:
            name, self.reports = line.rstrip("\n"), []
            item = items[name.rpartition("/")[2]]
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            serialise = session.config.hook.pytest_report_to_serializable
            print(json.dumps([serialise(config=session.config, report=report) for report in self.reports]), file=self.answers, flush=True)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)


if __name__ == "__main__":
    names, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")  # pytest keeps the tests from their own
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what pytest and the tests print is not an answer
    sys.exit(pytest.main([str(FOLDER), "-p", "no:cacheprovider"], plugins=[_OneByOne(names, answers)]))
