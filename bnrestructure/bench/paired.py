"""Interleaved, paired timing: A B C A B C ..., so that what slows the machine for a while slows every variant alike.

    timings = time_paired({"eager": eager_step, "restructured": our_step}, rounds=10)
    timings.spread("eager").median                  # seconds
    timings.ratio("eager", "restructured").median   # above 1: restructured is the faster one

Plain Python: it times any callables, on any device (they must synchronise it themselves).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["PairedTimings", "Spread", "quantile", "time_paired"]

#: A variant does one piece of work. It returns the seconds of each phase if it timed them; None is timed as ``step``.
Variant = Callable[[], Mapping[str, float] | None]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError for an empty sample."""
        ordered = sorted(values)
        return cls(*(quantile(ordered, share) for share in (0.5, 0.25, 0.75)))


def quantile(ordered: list[float], share: float) -> float:
    """The value below which ``share`` of an ascending sample lies, interpolated between neighbours."""
    if not ordered:
        raise ValueError("a quantile of no values")
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass
class PairedTimings:
    """``samples[variant][phase]`` are seconds, one per round; the i-th of every variant are of the same round."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def spread(self, variant: str, phase: str = "step") -> Spread:
        """Median and quartiles of a variant's seconds."""
        return Spread.of(self.samples[variant][phase])

    def ratio(self, of: str, to: str, phase: str = "step") -> Spread:
        """Median and quartiles, over rounds, of ``of``'s time divided by ``to``'s: how many times faster ``to`` is."""
        pairs = zip(self.samples[of][phase], self.samples[to][phase], strict=True)
        return Spread.of(a / b for a, b in pairs)

    def fastest(self, variants: Iterable[str], phase: str = "step") -> str:
        """The variant with the smallest median."""
        return min(variants, key=lambda name: self.spread(name, phase).median)


def time_paired(
    variants: Mapping[str, Variant],
    *,
    rounds: int = 10,
    warmup: int = 2,
    progress: Callable[[str], None] | None = None,
) -> PairedTimings:
    """Run every variant once per round, in order, ``warmup`` rounds untimed and ``rounds`` rounds timed.

    The garbage collector runs between rounds and not inside them. ``progress`` is told the name of each run before it.

    Raises ValueError for fewer than one round.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got rounds={rounds}, warmup={warmup}")
    timings = PairedTimings({name: {} for name in variants})
    collecting = gc.isenabled()
    try:
        for i in range(-warmup, rounds):
            gc.collect()
            gc.disable()
            for name, variant in variants.items():
                if progress is not None:
                    progress(name)
                phases = _timed(variant)
                if i >= 0:
                    for phase, seconds in phases.items():
                        timings.samples[name].setdefault(phase, []).append(seconds)
    finally:
        if collecting:
            gc.enable()
    return timings


def _timed(variant: Variant) -> Mapping[str, float]:
    start = time.perf_counter()
    phases = variant()
    seconds = time.perf_counter() - start
    return {"step": seconds} if phases is None else phases
