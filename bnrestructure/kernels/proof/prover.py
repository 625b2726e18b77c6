"""Which kinds of calls a device's kernels may answer, and which of a convolution's implementations is the fastest of those that are right.

A kind is proved for the implementation that is chosen for it. Then the others are proved, the right ones are timed beside each other
(race.py), and once all that is known the choices are made anew: a kind whose choice is another one then is proved for that.
"""

from __future__ import annotations

import base64
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward, Kernels
from bnrestructure.kernels.choice import Alternatives
from bnrestructure.kernels.device import DeviceKernels
from bnrestructure.kernels.folded import FoldedKernels, for_dimensions
from bnrestructure.kernels.proof.comparison import Comparison
from bnrestructure.kernels.proof.kinds import blanked, key_of, name_of, precision, text_of
from bnrestructure.kernels.proof.ledger import Ledger
from bnrestructure.kernels.proof.pool import MOST_WORKERS, Pool, Urgency

__all__ = ["Proved", "set_precision", "trusting", "waiting_for_proofs", "waits_for_proofs"]

R = TypeVar("R")
_Then = Callable[[dict[str, Any]], None]

_SECONDS = 300.0
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


@dataclass(frozen=True)
class _Kind:
    """One that was met. ``text``: what the ledger knows it by, with the implementation that is chosen for it; ``name``: for people."""

    blanks: Call[Any]
    device: torch.device
    alternatives: Alternatives | None
    text: str

    @property
    def name(self) -> str:
        return name_of(self.blanks)


class Proved:
    """A device's kernels, for calls of kinds that were proved; others are refused (:class:`bnrestructure.kernels.calls.Kernels`).

    source     the module that has them as ``KERNELS``, for the processes that prove
    trusted    answer every call: for those who hold the results against float64 themselves
    """

    def __init__(self, kernels: DeviceKernels, source: str, *, seconds: float = _SECONDS) -> None:
        self.kernels, self.trusted = kernels, False
        self._source = source
        self._pool = Pool(seconds)
        self._ledger = Ledger()
        self._met: dict[Any, _Kind] = {}  # by key
        self._called: set[Any] = set()  # keys of kinds that were met in a call, and not for a comparison alone
        self._proved: set[Any] = set()  # keys
        self._pending: dict[str, list[_Then]] = {}  # by text that a process is asked about: who wants to know
        self._comparisons: dict[str, Comparison] = {}  # by node
        self._measurements: list[tuning.Measurement] = []  # made, and not chosen by yet
        self._passing = False  # whether something was not proved for want of memory, say
        self._outstanding = 0
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
        """How many proofs and comparisons are under way."""
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
        """Kind, in words -> what is wrong with the kernels' answers, of the kinds that were called."""
        known = self._ledger.faults
        with self._lock:
            called = [kind for key, kind in self._met.items() if key in self._called]
            return {kind.name: fault for kind in called if (fault := known.get(kind.text)) is not None}

    def steps(self, program: str) -> dict[str, float] | None:
        """The seconds of a step each way that a process kept of this program on this machine, or None."""
        with self._lock:
            self._refresh()
            return self._ledger.steps.get(_chosen(program))

    def keep_steps(self, program: str, seconds: dict[str, float]) -> None:
        """Note them for later processes."""
        self._identify()
        self._ledger.put_steps(_chosen(program), seconds)

    def wait(self) -> None:
        """Until nothing is being proved or compared: at most the seconds that each request may take."""
        with self._settled:
            self._settled.wait_for(lambda: not self._outstanding)

    # --- kinds ---------------------------------------------------------------------------------------------------------

    def _meet(self, key: Any, call: Call[R], kernels: Kernels) -> R:
        """A call of a kind that is not known to be proved: answered if the ledger knows it, refused and asked about otherwise."""
        if (reason := kernels.supports(call)) is not None:
            raise UnsupportedCallError(reason)
        with self._lock:
            self._refresh()
            self._called.add(key)
            if key not in self._met:
                self._consider(key, blanked(call), call.operand.device)
                self._consider_images(call, kernels)
        if waits_for_proofs():
            with self._settled:
                self._settled.wait_for(lambda: self._is_known(key))
        with self._lock:
            usable = key in self._proved
            fault = self._ledger.faults.get(self._met[key].text) if key in self._met else None
        if usable:
            return kernels.run(call)
        raise UnsupportedCallError(fault or "it is being proved on this device")

    def _consider_images(self, call: Call[Any], kernels: Kernels) -> None:
        """Consider the 2-D convolution that one of other dimensions is done by, whose implementations can be compared."""
        images = kernels.of_images(call) if isinstance(kernels, FoldedKernels) else None
        if images is not None and self.kernels.supports(images) is None and (key := key_of(images)) not in self._met:
            self._consider(key, blanked(images), call.operand.device)

    def _is_known(self, key: Any) -> bool:
        text = self._met[key].text if key in self._met else ""
        return key in self._proved or key not in self._met or (text in self._ledger.faults and text != self._again)

    def _refresh(self) -> None:
        """See again what is proved where there are other choices; forget everything where it is another machine."""
        self._identify()
        if self._generation == tuning.generation:
            return
        self._generation = tuning.generation
        met, self._met, self._proved = self._met, {}, set()
        if self._ledger.refresh():
            self._comparisons, self._again = {}, None
            return
        for key, kind in met.items():
            self._consider(key, kind.blanks, kind.device)

    def _identify(self) -> None:
        """Tell kernels/tuning.py what machine this is: of a process that trains on a CPU, too, another one may have been told last."""
        self.kernels.description()

    def _consider(self, key: Any, blanks: Call[Any], device: torch.device) -> None:
        """See what the ledger knows of a kind, and ask where it knows nothing."""
        alternatives = None
        if isinstance(blanks, ConvForward | ConvBackward) and len(blanks.x.shape) == 4:
            alternatives = self.kernels.convolutions.alternatives(blanks, device)
        text = _text(blanks, device, alternatives.chosen if alternatives else None)
        kind = self._met[key] = _Kind(blanks, device, alternatives, text)
        known, fault = text in self._ledger.faults, self._ledger.faults.get(text)
        if known and fault is None and self._again is None:  # the first of those from disk: is it still so?
            self._again, known = text, False
        if not known:
            self._ask(text, kind, Urgency.NEEDED, partial(self._judge, key, text))
            return
        if fault is None:
            self._proved.add(key)
        self._compare(kind)

    def _judge(self, key: Any, text: str, answer: dict[str, Any]) -> None:
        """What was found of the implementation that was chosen for this kind when it was asked about."""
        kind, fault, passing = self._met.get(key), answer["fault"], answer.get("passing", False)
        self._passing = self._passing or passing
        if fault is not None and text == self._again and not passing:  # it was right once: nothing on disk is believed any more
            self._ledger.clear()
            self._proved.clear()
            self._comparisons = {}
            self._met = {key: kind} if kind is not None else {}
        if text == self._again:
            self._again = ""
        self._ledger.put(text, fault, keep=not passing)
        if kind is not None and kind.text == text:
            if fault is None:
                self._proved.add(key)
            if not passing:
                self._compare(kind)

    # --- implementations -----------------------------------------------------------------------------------------------

    def _compare(self, kind: _Kind) -> None:
        """Prove the other implementations of a product's node, and time those that are right: once, by the first kind that can tell."""
        of = kind.alternatives
        if of is None or of.measured or not of.decides or len(of.names) == 1 or of.node in self._comparisons:
            return
        comparison = self._comparisons[of.node] = Comparison(of)
        for name in of.names:
            text = _text(kind.blanks, kind.device, name)
            if name == "reference":
                comparison.tell(name, None)
            elif text in self._ledger.faults:
                comparison.tell(name, self._ledger.faults[text])
            else:
                self._ask(text, kind, Urgency.CANDIDATE, partial(self._tell, comparison, kind, name, text), name)
        self._race(comparison, kind)

    def _tell(self, comparison: Comparison, kind: _Kind, name: str, text: str, answer: dict[str, Any]) -> None:
        passing = answer.get("passing", False)
        self._ledger.put(text, answer["fault"], keep=not passing)
        comparison.tell(name, answer["fault"], passing=passing)
        self._race(comparison, kind)

    def _race(self, comparison: Comparison, kind: _Kind) -> None:
        """Time the right ones beside each other, once they are known."""
        if not comparison.ready or self._comparisons.get(comparison.node) is not comparison:
            return
        if len(comparison.right) > 1:
            self._send(kind, Urgency.ALONE, partial(self._finish, comparison), race=comparison.right)
        else:
            self._finish(comparison, {})

    def _finish(self, comparison: Comparison, answer: dict[str, Any]) -> None:
        measurement = comparison.measurement(answer.get("milliseconds", {}))
        if measurement is not None:
            self._measurements.append(measurement)
        elif comparison.right:
            self._passing = True

    def _choose(self) -> None:
        """Choose by what was measured. Only now that all is known: choices that change one by one would have kinds proved in vain."""
        self._identify()
        tuning.note(self._measurements)
        self._measurements = []
        self._refresh()

    # --- processes -----------------------------------------------------------------------------------------------------

    def _ask(self, text: str, kind: _Kind, urgency: Urgency, then: _Then, name: str | None = None) -> None:
        """Have a process prove a kind's call by the implementation of this name, by default the chosen one."""
        self._pending.setdefault(text, []).append(then)
        if len(self._pending[text]) == 1:
            self._send(kind, urgency, partial(self._tell_all, text), by=name)

    def _tell_all(self, text: str, answer: dict[str, Any]) -> None:
        for then in self._pending.pop(text):
            then(answer)

    def _send(self, kind: _Kind, urgency: Urgency, then: _Then, by: str | None = None, race: list[str] | None = None) -> None:
        chosen = kind.alternatives.chosen if kind.alternatives else None
        self._identify()
        request = {
            "call": base64.b64encode(pickle.dumps(kind.blanks)).decode(), "kernels": self._source, "device": str(kind.device),
            "share": 0.8 / MOST_WORKERS, "precision": precision(), "by": by or chosen, "race": race, "threads": torch.get_num_threads(),
            "benchmark": torch.backends.cudnn.benchmark, "choices": None if chosen else tuning.choices(),
        }  # fmt: skip
        self._outstanding += 1
        self._pool.ask(request, urgency, partial(self._answered, then))

    def _answered(self, then: _Then, answer: dict[str, Any]) -> None:
        with self._settled:
            try:
                then(answer)
                if self._outstanding == 1 and self._measurements:
                    self._choose()
            finally:
                self._outstanding -= 1
                self._settled.notify_all()


def _text(blanks: Call[Any], device: torch.device, name: str | None) -> str:
    """What a kind is known by: the device, the implementation, for products of views all choices that may be in it, and the kind."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name is None and isinstance(blanks, ConvForward | ConvBackward):
        name = tuning.choices_digest()
    return " ".join([where, *([f"by {name}:"] if name else []), text_of(blanks)])


def _chosen(program: str) -> str:
    """A program by the kernels that are chosen now."""
    return f"{program} {tuning.choices_digest()}"


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
