"""Worker processes for benchmarks/gpu.py: a kernel that crashes, or hangs, takes one result with it and no other.

An illegal address spoils CUDA for the whole process, so whatever fails, fails in a worker, and the next unit gets a fresh
one. Requests and results are lines of JSON; what a worker prints goes to the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["Pool", "Request", "worker_command"]

#: What one unit is asked of a worker: {"part": ..., "name": ..., ...}.
Request = dict[str, Any]
Result = dict[str, Any]
Report = Callable[[Request, Result | None], None]


#: Seconds that a killed process is waited for.
_GONE_WITHIN = 10.0


class _Worker:
    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.environment = environment
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=os.environ | environment, text=True
            )

    def ask(self, request: Request, seconds: float) -> Result:
        """The unit's result, or ``{"ok": False, "error": ...}`` when the worker failed or took longer than this."""
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
        return {"ok": False, "error": f"no result within {seconds:.0f} s" if late.is_set() else f"the process ended with status {code}"}

    def end(self) -> int | None:
        """Its exit status; None for one that the system does not let go of, as while a driver waits for the device."""
        with contextlib.suppress(OSError):
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(_GONE_WITHIN)
        return None


class Pool:
    """Workers, started as they are needed. ``deadline`` is a time.monotonic() at which whatever runs is ended."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path, deadline: float) -> None:
        self._start = lambda: _Worker(command, self._environment, log)
        self._own = self._environment = environment
        self._idle: list[_Worker] = []
        self._all: list[_Worker] = []
        self._lock = threading.Lock()
        self._deadline = deadline
        self._closed = False

    def run(
        self, requests: Iterable[Request], workers: int, seconds: float, start_until: float, report: Report, **variables: str
    ) -> None:
        """Report each request's result, one at a time: None for one that was not started before ``start_until``, or not finished
        when the pool's time was up. ``variables`` are added to the workers' environment.
        """
        self._environment = self._own | variables
        self._keep(workers)
        threads = ThreadPoolExecutor(workers)
        futures = [threads.submit(self._one, request, seconds, start_until, report) for request in requests]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            self.close()  # or their threads would go on waiting for them
            raise
        finally:
            threads.shutdown()

    def _one(self, request: Request, seconds: float, start_until: float, report: Report) -> None:
        result: Result | None = None
        if time.monotonic() < start_until and not self._closed:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                worker = self._start()
                with self._lock:
                    self._all.append(worker)
            remaining = self._deadline - time.monotonic()
            result = worker.ask(request, min(seconds, remaining))
            if "error" in result:
                worker.end()
                if self._closed or (remaining < seconds and time.monotonic() >= self._deadline):
                    result = None  # it was ended for no fault of its own
            else:
                with self._lock:
                    self._idle.append(worker)
        with self._lock:
            if not self._closed:
                report(request, result)

    def _keep(self, count: int) -> None:
        """End all idle workers but this many of the same environment: they hold memory, and what is timed should be alone."""
        with self._lock:
            kept = [worker for worker in self._idle if worker.environment == self._environment][:count]
            for worker in self._idle:
                if worker not in kept:
                    worker.end()
            self._idle = kept

    def close(self) -> None:
        """End them all."""
        self._closed = True
        for worker in self._all:
            worker.end()


def worker_command() -> list[str]:
    """What runs gpu_worker.py."""
    return [sys.executable, str(Path(__file__).parent / "gpu_worker.py")]
