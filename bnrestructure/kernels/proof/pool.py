"""The processes that prove and time kernels: requests in order of urgency, each answered by a process that may crash or hang."""

from __future__ import annotations

import atexit
import heapq
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

from bnrestructure.core.workers import Worker

__all__ = ["MOST_WORKERS", "Pool", "Urgency", "open_workers"]

_MOST = 4
#: How many processes work at once: the training process keeps a core.
MOST_WORKERS = max(1, min(_MOST, (os.cpu_count() or 1) - 1))
#: Seconds that a process waits for the next request: it takes some to start.
_IDLE_SECONDS = 10.0
_MODULE = "bnrestructure.kernels.proof.worker"
#: What a process ends with that a kernel has brought down. Others were ended by somebody.
_CRASHES = frozenset({-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL, -getattr(signal, "SIGBUS", signal.SIGSEGV)})
open_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_closing = threading.Event()


class Urgency(IntEnum):
    """Which requests come first."""

    #: The rewritten program waits for it.
    NEEDED = 0
    #: A kernel that may be faster.
    CANDIDATE = 1
    #: It takes times: nothing else of this pool runs beside it.
    ALONE = 2


class _Request(NamedTuple):
    urgency: Urgency
    number: int
    what: dict[str, Any]
    then: Callable[[dict[str, Any]], None]


class Pool:
    """``seconds``: how long a request may take: compilers are slow, and what hangs must not hold the others up for ever."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._numbers = itertools.count()
        self._requests: list[_Request] = []  # a heap
        self._workers, self._busy, self._alone = 0, 0, False
        self._changed = threading.Condition()

    def ask(self, what: dict[str, Any], urgency: Urgency, then: Callable[[dict[str, Any]], None]) -> None:
        """Have a process answer; ``then(answer)`` is called by another thread. An answer has "fault", and "passing" where it may pass."""
        with self._changed:
            heapq.heappush(self._requests, _Request(urgency, next(self._numbers), what, then))
            if self._workers < min(MOST_WORKERS, self._busy + len(self._requests)):
                self._workers += 1
                threading.Thread(target=self._work, daemon=True, name="bnrestructure proofs").start()
            self._changed.notify_all()

    def _work(self) -> None:
        """Have requests answered by a process, while any come."""
        worker: Worker | None = None
        while (request := self._taken()) is not None:
            try:
                if worker is None or not worker.lives:
                    worker = _started()
                answer = worker.ask(request.what, self._seconds)
                if "error" in answer:  # it crashed, hung, or was ended
                    answer = {"fault": answer["error"], "passing": answer["status"] not in _CRASHES, "last": True}
                if answer["last"]:
                    worker.end()
                    worker = None
            except Exception as error:  # whoever waits must not wait for ever
                worker, answer = None, {"fault": f"it could not be proved: {type(error).__name__}: {error}", "passing": True}
            try:
                if not _closing.is_set():
                    request.then(answer)
            finally:
                self._done()
        if worker is not None:
            worker.end()

    def _taken(self) -> _Request | None:
        """The next request, or None when none has come for a while: then this thread counts no more."""
        with self._changed:
            while not self._changed.wait_for(self._may_begin, _IDLE_SECONDS):
                if not self._requests:
                    self._workers -= 1
                    return None
            request = heapq.heappop(self._requests)
            self._busy += 1
            self._alone = request.urgency is Urgency.ALONE
            return request

    def _may_begin(self) -> bool:
        """Whether the next request can run beside those that do."""
        return bool(self._requests) and not self._alone and not (self._busy and self._requests[0].urgency is Urgency.ALONE)

    def _done(self) -> None:
        with self._changed:
            self._busy -= 1
            self._alone = False
            self._changed.notify_all()


def _started() -> Worker:
    """A process that finds the packages that this one finds. Raises RuntimeError where this one is no Python interpreter."""
    if getattr(sys, "frozen", False) or not sys.executable:
        raise RuntimeError("this program is no Python interpreter that could start another one")
    paths = os.pathsep.join(path for path in sys.path if path)
    worker = Worker([sys.executable, "-P", "-m", _MODULE], {"PYTHONPATH": paths}, subprocess.DEVNULL, apart=True)
    open_workers.add(worker)
    return worker


@atexit.register
def _end_workers() -> None:
    _closing.set()
    for worker in list(open_workers):
        worker.end()
