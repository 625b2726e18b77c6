"""Which kinds of calls a device's kernels may answer, and the processes that find out."""

from __future__ import annotations

import atexit
import base64
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.core.workers import Worker
from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import Call, Kernels
from bnrestructure.kernels.device import DeviceKernels
from bnrestructure.kernels.folded import for_dimensions
from bnrestructure.kernels.proof.kinds import blanked, key_of, name_of, precision, text_of
from bnrestructure.kernels.proof.ledger import Ledger

__all__ = ["Proved", "set_precision", "trusting", "waiting_for_proofs", "waits_for_proofs"]

R = TypeVar("R")

#: Seconds that a kind may take: compilers are slow, and what hangs must not hold the others up for ever.
_SECONDS = 300.0
_WORKERS = 4
#: Seconds that a process waits for the next kind: it takes some to start.
_IDLE_SECONDS = 10.0
_MODULE = "bnrestructure.kernels.proof.worker"
#: What a process ends with that a kernel has brought down. Others were ended by somebody.
_CRASHES = frozenset({-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL, -getattr(signal, "SIGBUS", signal.SIGSEGV)})
_open: weakref.WeakSet[Worker] = weakref.WeakSet()
_closing = threading.Event()
_waiting = [0]


@contextmanager
def waiting_for_proofs() -> Iterator[None]:
    """Within the block a call of a kind that is not proved yet waits until it is, or is known to be wrong: for those who judge kernels."""
    _waiting[0] += 1
    try:
        yield
    finally:
        _waiting[0] -= 1


def waits_for_proofs() -> bool:
    """Whether this is within :func:`waiting_for_proofs`, in any thread: backward passes have threads of their own."""
    return _waiting[0] > 0


def set_precision(value: str) -> None:
    """Multiply like the process that asks."""
    torch.backends.cudnn.conv.fp32_precision = value  # type: ignore[attr-defined]


class Proved:
    """A device's kernels, for calls of kinds that were proved; others are refused (:class:`bnrestructure.kernels.calls.Kernels`).

    source     the module that has them as ``KERNELS``, for the processes that prove
    trusted    answer every call: for those who hold the results against float64 themselves
    """

    def __init__(self, kernels: DeviceKernels, source: str, *, seconds: float = _SECONDS) -> None:
        self.kernels, self.trusted = kernels, False
        self._source, self._seconds = source, seconds
        self._most_workers = max(1, min(_WORKERS, (os.cpu_count() or 1) - 1))
        self._ledger = Ledger()
        self._proved: set[Any] = set()
        self._asked: dict[Any, tuple[str, str]] = {}  # key -> (text, name), of every kind that was met
        self._passing = False  # whether something was not proved for want of memory, say
        self._requests: queue.SimpleQueue[tuple[Any, dict[str, Any]]] = queue.SimpleQueue()
        self._outstanding, self._workers = 0, 0
        self._again: str | None = None  # the kind whose proof from disk is being held against this process, "" when that is done
        self._generation = -1
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)

    # --- kernels -------------------------------------------------------------------------------------------------------

    def run(self, call: Call[R]) -> R:
        """The call's result. Raises UnsupportedCallError where its kind is not proved, or the kernels cannot answer."""
        kernels = for_dimensions(self.kernels, call.operand.dim())  # a call is proved as a whole: no part of it is refused half way
        if self.trusted:
            return kernels.run(call)
        key = key_of(call)
        if key in self._proved and self._generation == tuning.generation:
            return kernels.run(call)
        return self._meet(key, call, kernels)

    def supports(self, call: Call[Any]) -> str | None:
        """Why the kernels cannot answer the call, in one line, or None; whether its kind is proved is another question."""
        return for_dimensions(self.kernels, call.operand.dim()).supports(call)

    # --- what is known of them -----------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """How many kinds are being proved."""
        return self._outstanding

    @property
    def proved(self) -> int:
        """How many kinds that were met are proved."""
        return len(self._proved)

    @property
    def complete(self) -> bool:
        """Whether all is known of every kind that was met: nothing is being proved, and nothing failed that may succeed another time."""
        return not self._outstanding and not self._passing

    def faults(self) -> dict[str, str]:
        """Kind, in words -> what is wrong with the kernels' answers, of the kinds that were met."""
        known = self._ledger.faults
        with self._lock:
            return {name: fault for text, name in self._asked.values() if (fault := known.get(text)) is not None}

    def steps(self, program: str) -> dict[str, float] | None:
        """The seconds of a step each way that a process kept of this program on this machine, or None."""
        with self._lock:
            self._refresh()
            return self._ledger.steps.get(program)

    def keep_steps(self, program: str, seconds: dict[str, float]) -> None:
        """Note them for later processes."""
        self._ledger.put_steps(program, seconds)

    def wait(self) -> None:
        """Until nothing is being proved: at most the seconds that each kind may take."""
        with self._settled:
            self._settled.wait_for(lambda: not self._outstanding)

    # --- finding out ---------------------------------------------------------------------------------------------------

    def _meet(self, key: Any, call: Call[R], kernels: Kernels) -> R:
        """A call of a kind that is not known to be proved: answered if the ledger knows it, refused and asked about otherwise."""
        if (reason := kernels.supports(call)) is not None:
            raise UnsupportedCallError(reason)
        self._look_up(key, call)
        if waits_for_proofs():
            with self._settled:
                self._settled.wait_for(lambda: self._is_known(key))
        with self._lock:
            usable = key in self._proved
            fault = self._ledger.faults.get(self._asked[key][0]) if key in self._asked else None
        if usable:
            return kernels.run(call)
        raise UnsupportedCallError(fault or "it is being proved on this device")

    def _look_up(self, key: Any, call: Call[Any]) -> None:
        """See what the ledger knows of a kind, and ask where it knows nothing."""
        with self._lock:
            self._refresh()
            if key in self._proved or key in self._asked:
                return
            blanks = blanked(call)
            text = f"{_device_name(call.operand.device)} {text_of(blanks)}"
            self._asked[key] = text, name_of(blanks)
            known, fault = text in self._ledger.faults, self._ledger.faults.get(text)
            if known and fault is None and self._again is None:  # the first of those from disk: is it still so?
                self._again, known = text, False
            if not known:
                self._ask(key, call, blanks)
            elif fault is None:
                self._proved.add(key)

    def _is_known(self, key: Any) -> bool:
        text = self._asked[key][0] if key in self._asked else ""
        return key in self._proved or key not in self._asked or (text in self._ledger.faults and text != self._again)

    def _refresh(self) -> None:
        """Forget what was proved of kernels that are not the ones any more: there are new choices among them."""
        if self._generation != tuning.generation:
            self._generation = tuning.generation
            self.kernels.description()  # says what machine this is
            if self._ledger.refresh():
                self._proved, self._asked = set(), {}

    def _ask(self, key: Any, call: Call[Any], blanks: Call[Any]) -> None:
        self.kernels.description()  # says what machine this is: its choices are meant
        request = {
            "call": base64.b64encode(pickle.dumps(blanks)).decode(), "kernels": self._source, "device": str(call.operand.device),
            "share": 0.8 / self._most_workers, "precision": precision(), "choices": tuning.choices_digest(),
        }  # fmt: skip
        self._outstanding += 1
        self._requests.put((key, request))
        if self._workers < min(self._most_workers, self._outstanding):
            self._workers += 1
            threading.Thread(target=self._work, daemon=True, name="bnrestructure proofs").start()

    def _work(self) -> None:
        """Have requests answered by a process, while any come."""
        worker: Worker | None = None
        while True:
            try:
                key, request = self._requests.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if not self._requests.empty():
                        continue
                    self._workers -= 1
                break
            try:
                if worker is None or not worker.lives:
                    worker = _started()
                answer = worker.ask(request, self._seconds)
                if "error" in answer:  # it crashed, hung, or was ended
                    answer = {"fault": answer["error"], "passing": answer["status"] not in _CRASHES, "last": True}
                if answer["last"]:
                    worker.end()
                    worker = None
            except Exception as error:  # whoever waits must not wait for ever
                worker, answer = None, {"fault": f"it could not be proved: {type(error).__name__}: {error}", "passing": True}
            self._note(key, answer)
        if worker is not None:
            worker.end()

    def _note(self, key: Any, answer: dict[str, Any]) -> None:
        with self._settled:
            try:
                known = self._asked.get(key)
                if known is not None and not _closing.is_set():
                    self._believe(key, known, answer["fault"], passing=answer.get("passing", False))
            finally:
                self._outstanding -= 1
                self._settled.notify_all()

    def _believe(self, key: Any, known: tuple[str, str], fault: str | None, *, passing: bool) -> None:
        text = known[0]
        self._passing = self._passing or passing
        if fault is None:
            self._proved.add(key)
        elif text == self._again and not passing:  # it was right once: nothing on disk is believed any more
            self._ledger.clear()
            self._proved.clear()
            self._asked = {key: known}
        if text == self._again:
            self._again = ""
        self._ledger.put(text, fault, keep=not passing)


def _started() -> Worker:
    """A process that finds the packages that this one finds. Raises RuntimeError where this one is no Python interpreter."""
    if getattr(sys, "frozen", False) or not sys.executable:
        raise RuntimeError("this program is no Python interpreter that could start another one")
    paths = os.pathsep.join(path for path in sys.path if path)
    worker = Worker([sys.executable, "-P", "-m", _MODULE], {"PYTHONPATH": paths}, subprocess.DEVNULL, apart=True)
    _open.add(worker)
    return worker


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@atexit.register
def _end_workers() -> None:
    _closing.set()
    for worker in list(_open):
        worker.end()


@contextmanager
def trusting(kernels: Proved | None) -> Iterator[None]:
    """Within the block every call is answered."""
    if kernels is None:
        yield
        return
    before, kernels.trusted = kernels.trusted, True
    try:
        yield
    finally:
        kernels.trusted = before
