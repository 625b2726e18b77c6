"""Rewritten programs on devices whose kernels are proved first: what runs until then, and whether a rewritten step is worth it.

A program's life there, for inputs of one size: one step on the reference's kernels, by which its calls are known; then the module's own
forward, while the kinds of these calls are proved (kernels/proof); then turns of a few steps of either, timed; then whichever is faster.

Of several processes that train together the first one times, and says what it has found (verdict.py). Its steps wait for the others', so
that a faster one does not show; a slower one does, which is what the timing is there for.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median

import torch

from bnrestructure.capture import verdict
from bnrestructure.core.errors import first_line
from bnrestructure.kernels.proof.prover import Proved, waits_for_proofs

__all__ = ["Probation", "own_forwards", "saves_by_hooks", "wants_own_forwards"]

#: Steps of a turn; the first one is not timed, as it finds the other program's memory. Turns of each kind.
_STEPS, _TURNS = 4, 3
#: How often timing begins anew because other kinds of calls came up.
_RESTARTS = 3
#: Asking the first process takes a message to another machine: each call asks at first, then one in so many.
_ASKED_AT_EACH, _ONE_IN = 64, 16
#: A rewritten step may take so much longer: it keeps less memory, and times are no more exact than that.
_MARGIN = 1.02

_state = threading.local()


@contextmanager
def own_forwards() -> Iterator[None]:
    """Within the block this thread's modules run their own forwards, those inside of them too."""
    before = wants_own_forwards()
    _state.own = True
    try:
        yield
    finally:
        _state.own = before


def wants_own_forwards() -> bool:
    """Whether this is within :func:`own_forwards`."""
    return getattr(_state, "own", False)


def saves_by_hooks() -> bool:
    """Whether somebody handles what is saved for backward: torch.utils.checkpoint, which calls the module again, or an offloader."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _say(words: str) -> None:
    """A line on a terminal: whoever sits there wonders about the first steps."""
    if getattr(sys.stderr, "isatty", lambda: False)():
        with suppress(OSError, ValueError):  # a terminal that is gone
            print(f"bnrestructure: {words}", file=sys.stderr)


#: Why steps cannot be timed, and when.
_UNTIMED: dict[str, Callable[[], bool]] = {
    "its steps cannot be timed in a checkpoint, or with other hooks on saved tensors: backend='cuda' runs them untimed": saves_by_hooks,
    "its steps cannot be timed in a CUDA graph: backend='cuda' runs them untimed": _captures,
}
#: Where processes wait for each other within a forward pass all must run the same program, rewritten or not.
_IN_STEP = "several processes would have to agree on its steps' times, for they merge their statistics: backend='cuda' runs them untimed"


@dataclass
class Probation:
    """One program's, for inputs of one size.

    ``program`` names it on disk; ``guarded``: whether its steps have to be as fast; ``in_step``: whether it merges statistics across
    processes.
    """

    kernels: Proved
    program: str
    guarded: bool
    in_step: bool
    device: torch.device
    reason: str | None = None
    _decided: bool | None = None
    _latest: bool = False
    _said: bool = False
    _learnt: bool = False
    _calls: int = 0
    _restarts: int = 0
    _began: float = 0.0
    _verdict: str | None = None
    _seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    def rewritten(self) -> bool:
        """Whether this call is to run the rewritten program."""
        self._latest = self._choice()
        return self._latest

    @property
    def settled(self) -> bool:
        """Whether it is decided, for the rewritten program."""
        return self._decided is True

    def _choice(self) -> bool:
        if waits_for_proofs():
            return True
        if self._decided is not None:
            return self._decided
        untimed = next((reason for reason, holds in _UNTIMED.items() if holds()), None)
        if untimed is None and (self.in_step or not self.guarded) and verdict.of_several():
            untimed = _IN_STEP
        if untimed is None:
            return self._next()
        if self.guarded:
            self.give_up(untimed)
        return not self.guarded  # the reference answers what is not proved yet: programs must not change in the midst of these

    def give_up(self, reason: str) -> None:
        """The own forward it is."""
        self._decided, self.reason = False, reason
        if self.guarded:
            verdict.tell(self.program, reason)

    def _next(self) -> bool:
        if not self._learnt:
            if self.guarded and not verdict.is_heard() and (known := self.kernels.steps(self.program)) is not None:
                return self._decide(known["rewritten"], known["own"])
            self._learnt = True
            return True
        if self.guarded and verdict.is_heard():
            return self._heard()
        if self.kernels.outstanding and self._restarts < _RESTARTS:  # other kinds of calls came up: their times would be the reference's
            self._restarts += bool(self._calls)
            self._calls, self._seconds = 0, {False: [], True: []}
            if not self._said:
                self._said = True
                _say(f"{self.kernels.outstanding} kernels are being proved on {self.device}, and the model's own forward trains meanwhile")
            return False
        if not self.guarded:
            self._decided = True
            return True
        return self._timed()

    def _heard(self) -> bool:
        """The own forward until the first process has told what it is, and until the kernels are proved here, too."""
        self._calls += 1
        if self._verdict is None and (self._calls <= _ASKED_AT_EACH or self._calls % _ONE_IN == 0):
            try:
                self._verdict = verdict.heard(self.program)
            except Exception as error:  # of whatever store the processes have met by
                self._verdict = f"it cannot be asked: {type(error).__name__}: {first_line(error)}"
        if self._verdict:
            self._decided, self.reason = False, f"of the first process: {self._verdict}"
        elif self._verdict is not None and not self.kernels.outstanding:
            self._decided = True
        return self._decided is True

    def _timed(self) -> bool:
        """Turns of the own forward and of the rewritten one, :data:`_TURNS` of each; a turn ends where the next one begins."""
        turn, step = divmod(self._calls, _STEPS)
        if step == 0 and turn:
            self._seconds[turn % 2 == 0].append((self._clock() - self._began) / (_STEPS - 1))
        if turn == 2 * _TURNS:
            own, rewritten = (median(self._seconds[arm]) for arm in (False, True))
            if self.kernels.complete:
                self.kernels.keep_steps(self.program, {"own": own, "rewritten": rewritten})
            _say(f"a training step takes {rewritten * 1e3:.1f} ms rewritten, {own * 1e3:.1f} ms as it was: the faster stays")
            return self._decide(rewritten, own)
        if step == 1:
            self._began = self._clock()
        self._calls += 1
        return turn % 2 == 1

    def _decide(self, rewritten: float, own: float) -> bool:
        self._decided = rewritten <= _MARGIN * own
        times = f"{own * 1e3:.1f} ms, rewritten {rewritten * 1e3:.1f} ms"
        self.reason = None if self._decided else f"its own forward's training steps are faster on this device: {times}"
        verdict.tell(self.program, self.reason or "")
        return self._decided

    def _clock(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def __str__(self) -> str:
        """Where it stands, in a line."""
        if self.reason is None and self.kernels.outstanding:
            meanwhile = "the reference answers for them" if self._latest else "its own forward runs"
            return f"its kernels are being proved on this device ({self.kernels.outstanding} to go); meanwhile {meanwhile}"
        if self._decided is None:
            if verdict.is_heard():
                return "the first process times its steps beside those of its own forward, and has told nothing yet"
            return "its steps are being timed beside those of its own forward"
        return self.reason or f"its kernels were proved on this device ({self.kernels.proved} kinds of calls)"
