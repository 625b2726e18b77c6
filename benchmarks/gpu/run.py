"""Goes through the schedule of benchmarks/gpu: what is not in the results yet, as long as there is time, in processes of their own.

An illegal address spoils CUDA for the whole process, so whatever fails, fails in a worker, and the next unit gets a fresh one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT
from benchmarks.gpu.results import Results, facts, is_ours
from benchmarks.gpu.schedule import BATCHES, PARTS, WARMED, proof_of, schedule, served_by
from benchmarks.gpu.summary import summarise
from bnrestructure.core.workers import Worker

__all__ = ["Pool", "Request", "run", "worker_command"]


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
    """What runs worker.py."""
    return [sys.executable, "-m", "benchmarks.gpu.worker"]


#: Nothing new is started this long before the end.
_LAST_START = 20.0
#: What this process may use; more than 16 compile nothing faster.
_CORES = min(len(os.sched_getaffinity(0)), 16)


def run(chosen: list[str], path: Path, seconds: float, *, dry: bool = False, retry: bool = False) -> int:
    """Run what is not in the file yet, within the time. Returns the exit status."""
    turn = _Run(path, seconds, dry, retry)
    wanted = _with_requirements(chosen)
    try:
        for part, names in schedule(dry):
            if part in wanted:
                turn.go(part, names)
    except _RefusedError as refusal:
        print(f"The GPU benchmark cannot run here: {refusal}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. What was done is kept, and the next run goes on from there.", file=sys.stderr)
    finally:
        turn.pool.close()
    if dry:
        print("A dry run: the times below mean nothing.")
    failed = summarise(turn.up_to_date(), wanted)
    for what, which in (("failed", failed), ("left for the next run", turn.left)):
        if which:
            print(f"{len(which)} {what}: {', '.join(which[:6])}{', ...' if len(which) > 6 else ''}")
    print(f"results: {path}")
    return int(bool(failed))


class _RefusedError(Exception):
    """Nothing can be run at all."""


class _Run:
    """One run of the command. ``left`` names the units that there was no time for."""

    def __init__(self, path: Path, seconds: float, dry: bool, retry: bool) -> None:
        self.results, self.left = Results(path), list[str]()
        self._start, self._end, self._dry, self._retry = time.monotonic(), time.monotonic() + seconds, dry, retry
        self._facts = facts()
        log = path.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths)} | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})
        self.pool = Pool(worker_command(), environment, log, self._end)

    def go(self, part: str, names: list[str]) -> None:
        """Run those of the units that have no result yet, or only one of other sources; those that failed side by side, again alone."""
        wanted = [name for name in names if self._is_due(part, name)]
        workers = min(PARTS[part].workers, max(1, _CORES - 2))
        if failed := self._ask(part, wanted, workers):
            self._ask(part, failed, 1)

    def up_to_date(self) -> dict[str, Any]:
        """What was found, without the results of other sources."""
        found = dict(self.results.found)
        for part in PARTS.keys() & found.keys() - {"environment"}:
            found[part] = {name: result for name, result in found[part].items() if self._result(part, name) is not None}
        return found

    def _result(self, part: str, name: str) -> dict[str, Any] | None:
        """The unit's result, unless it is one of other sources."""
        result = self.results.get(part, name)
        if result is not None and is_ours(part, name) and result.get("sources") != self._facts["sources"]:
            return None
        return result

    def _is_due(self, part: str, name: str) -> bool:
        """Whether to run the unit now. Where its numbers are wrong that is its result; where nobody knows yet, it is left."""
        if part in WARMED:
            return any(self._is_missing(*served) and self._unproven(*served) is None for served in served_by(part, name))
        unproven = self._unproven(part, name)
        if unproven is not None and not unproven[1]:
            self.left.append(f"{part}: {name}")
            return False
        if unproven is not None:
            self._put(part, name, {"ok": False, "refused": True, "reason": unproven[0]})
            return False
        return self._is_missing(part, name)

    def _is_missing(self, part: str, name: str) -> bool:
        before = self._result(part, name)
        return before is None or "refused" in before or (self._retry and not before["ok"])

    def _unproven(self, part: str, name: str) -> tuple[str, bool] | None:
        """What the unit lacks for being timed, and whether that is known to be wrong; None if it lacks nothing."""
        for before in proof_of(part, name):
            result = self._result(*before)
            if result is None or not result["ok"]:
                what = "the machine's ceilings are not known" if before[0] == "ceilings" else "its numbers are wrong, or were not checked"
                return f"{what}: see {before[1]!r} of the part {before[0]!r}", result is not None
        return None

    def _ask(self, part: str, names: list[str], workers: int) -> list[str]:
        """Have these run; returns those to be run again alone: those that failed side by side otherwise than by wrong numbers.

        They may have been short of memory, and if there is no time to try, that they failed must not be what is remembered.
        """
        again: list[str] = []
        if not names:
            return again  # and the workers of the other parts live on

        def report(request: dict[str, Any], result: dict[str, Any] | None) -> None:
            name = request["name"]
            if result is None:
                if PARTS[part].kept:
                    self.left.append(f"{part}: {name}")
                return
            if workers > 1 and (result.get("reason") == "out of memory" if part in WARMED else "error" in result):
                again.append(name)
            elif PARTS[part].kept:
                self._put(part, name, result)
            line = json.dumps(result, default=str)[:300]  # in the run's output, too: the file may be lost
            print(f"[{time.monotonic() - self._start:4.0f} s] {part}: {name}: {line}", file=sys.stderr, flush=True)
            if part == "environment":
                self._begin(result)

        requests = [{"part": part, "name": name, "dry": self._dry, **self._known(part, name)} for name in names]
        variables = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, _CORES // workers))}
        self.pool.run(requests, workers, PARTS[part].seconds, self._end - _LAST_START, report, **variables)
        return again

    def _known(self, part: str, name: str) -> dict[str, Any]:
        """What a unit has to know of the others' results."""
        if part == "kernels":
            return {"ceilings": self._result("ceilings", "ceilings")}
        if part in BATCHES:
            eager = self._result(part, f"{name.partition(' ')[0]} eager")
            return {"losses": eager.get("losses") if eager is not None and eager["ok"] else None}
        return {}

    def _put(self, part: str, name: str, result: dict[str, Any]) -> None:
        own = {"sources": self._facts["sources"]} if is_ours(part, name) else {}
        self.results.put(part, name, result | own)

    def _begin(self, environment: dict[str, Any]) -> None:
        """Raises where the results cannot be begun, or gone on with, on this machine."""
        if not environment["ok"]:
            raise _RefusedError(str(environment["error"]).removeprefix("RuntimeError: "))
        if not self.results.is_of(environment):
            path = self.results.path
            raise _RefusedError(f"{path} holds results of another device or other versions: name another file with --results")
        self.results.begin(self._facts)


def _with_requirements(chosen: list[str]) -> set[str]:
    found = {"environment", *chosen}
    while (more := found | {before for part in found for before in PARTS[part].requires}) != found:
        found = more
    return found
