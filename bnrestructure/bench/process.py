"""Starting a measuring process with an allocator setting of its own, and listening to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bnrestructure.bench.settings import MALLOC, Settings
from bnrestructure.core.errors import BNRestructureError, UsageError

__all__ = ["JobFailedError", "run_job"]


class JobFailedError(BNRestructureError):
    """A measuring process ended without a result; the message has its last words."""


def run_job(
    job: str,
    settings: Settings,
    *,
    malloc: str = "default",
    limit: float | None = None,
    listen: Callable[[dict[str, Any]], None] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """The result of a job of ``jobs.JOBS``, run in a fresh process.

    ``malloc`` names an allocator setting, ``limit`` is in seconds, ``listen`` is given the job's progress.

    Raises UsageError when the job says that it was asked for something impossible, JobFailedError when it dies or takes
    too long.
    """
    request = {"job": job, "settings": asdict(settings), "arguments": arguments}
    with (
        tempfile.TemporaryFile("w+") as words,
        _process(malloc, settings.threads, words) as process,
        _ended_after(limit, process) as late,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            json.dump(request, stdin)
        answer: dict[str, Any] = {}
        for line in process.stdout:
            answer = json.loads(line)
            if listen is not None and not answer.keys() & {"result", "error"}:
                listen(answer)
        status = process.wait()
        if "error" in answer:
            raise UsageError(answer["error"])
        if "result" not in answer:
            if late.is_set():
                raise JobFailedError(f"{job} took more than {limit:.0f} s")
            raise JobFailedError(f"{job} failed: {_last_words(words, status)}")
        return answer["result"]


@contextlib.contextmanager
def _process(malloc: str, threads: int | None, words: Any) -> Any:
    """A worker in a process group of its own with what it starts (compilers); ended when the block is left early."""
    environment = {k: v for k, v in os.environ.items() if not any(k in tuned for tuned in MALLOC.values())} | MALLOC[
        malloc
    ]
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, "-m", "bnrestructure.bench.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        _end(process)
        process.wait()


def _end(process: subprocess.Popen[str]) -> None:
    """End the worker and its group, unless it has ended by itself (then the number may be another's by now)."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _ended_after(limit: float | None, process: subprocess.Popen[str]) -> Any:
    """End the process group after ``limit`` seconds, and remember that in the event that is handed out."""
    late = threading.Event()
    if limit is None:
        yield late
        return

    def end() -> None:
        late.set()
        _end(process)

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _last_words(words: Any, status: int) -> str:
    words.seek(0)
    lines = [line.strip() for line in words.read().splitlines() if line.strip()]
    if status < 0:
        return f"ended by signal {-status}" + (" (out of memory?)" if status == -signal.SIGKILL else "")
    return lines[-1] if lines else f"exit status {status}"
