"""A process that answers requests, one line of JSON each: what crashes or hangs in it takes one answer with it, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

__all__ = ["Worker"]

#: Seconds that a killed process is waited for.
_GONE_WITHIN = 10.0


class Worker:
    """The process of ``command``, with ``environment`` added to this process's; what it prints on stderr goes to ``words``.

    ``apart``: it is not interrupted with this process from a terminal.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], words: IO[Any] | int, *, apart: bool = False) -> None:
        self.environment = dict(environment)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, env=os.environ | self.environment, text=True,
            start_new_session=apart,
        )  # fmt: skip

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer, or ``{"ok": False, "error": ...}`` when it ended, wrote no JSON or took longer; then it is of no more use."""
        process, late = self.process, threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(max(seconds, 0.0), stop)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            found = json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            found = None
        finally:
            timer.cancel()
        if isinstance(found, dict):
            return found
        code = self.end()
        said = f"no result within {seconds:.0f} s" if late.is_set() else f"the process ended with status {code}"
        return {"ok": False, "error": said, "status": None if late.is_set() else code}

    def end(self) -> int | None:
        """Its exit status; None for one that the system does not let go of, as while a driver waits for the device."""
        with contextlib.suppress(OSError):
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(_GONE_WITHIN)
        return None
