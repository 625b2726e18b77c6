"""Worker processes for benchmarks/gpu.py: a kernel that crashes, or hangs, takes one result with it and no other.

An illegal address spoils CUDA for the whole process, so whatever fails, fails in a worker, and the next unit gets a fresh
one. Requests and results are lines of JSON; what a worker prints goes to the log.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bnrestructure.core.workers import Worker

__all__ = ["Pool", "Request", "worker_command"]

#: What one unit is asked of a worker: {"part": ..., "name": ..., ...}.
Request = dict[str, Any]
Result = dict[str, Any]
Report = Callable[[Request, Result | None], None]


class Pool:
    """Workers, started as they are needed. ``deadline`` is a time.monotonic() at which whatever runs is ended."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path, deadline: float) -> None:
        self._start = lambda: _started(command, self._environment, log)
        self._own = self._environment = environment
        self._idle: list[Worker] = []
        self._all: list[Worker] = []
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


def _started(command: Sequence[str], environment: dict[str, str], log: Path) -> Worker:
    with log.open("ab") as words:
        return Worker(command, environment, words)


def worker_command() -> list[str]:
    """What runs gpu_worker.py."""
    return [sys.executable, str(Path(__file__).parent / "gpu_worker.py")]
