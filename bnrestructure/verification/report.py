"""What a verification found: one comparison per tensor, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["KINDS", "Comparison", "VerificationReport"]

#: What is compared, in the order in which a fault spreads.
KINDS = ("error", "output", "buffer", "gradient", "input gradient", "parameter")


@dataclass(frozen=True)
class Comparison:
    """One tensor of the restructured model against its truth.

    stage         ``float64``, the training dtype (``float32``, ``bfloat16`` ...) ``draws`` or ``eval``
    step          the training step, from 1; 0 for eval
    kind          one of KINDS; ``error`` when the restructured model raised or lacks something, said in ``name``
    name          the parameter's or buffer's name, or the output's or input's place
    error         relative distance to the truth
    limit         what the distance may be
    eager_error   the original model's own distance in the same dtype: in float64 from itself rounded at random, where
                  that was tried; None in the eval stage
    """

    stage: str
    step: int
    kind: str
    name: str
    error: float
    limit: float
    eager_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the distance is within the limit (never for NaN)."""
        return self.error <= self.limit

    @property
    def ratio(self) -> float:
        """error / limit; infinite for NaN."""
        if math.isnan(self.error):
            return math.inf
        if self.limit == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.limit

    def __str__(self) -> str:
        where = f"{self.stage}, step {self.step}" if self.step else self.stage
        if self.kind == "error":
            return f"{where}: {self.name}"
        own = "" if self.eager_error is None else f" (eager's own {self.eager_error:.1e})"
        return f"{where}: {self.kind} {self.name}: error {self.error:.1e}{own}, limit {self.limit:.1e}"


@dataclass
class VerificationReport:
    """The outcome of :func:`bnrestructure.verify`.

    ``comparisons`` holds every tensor of every stage and step, ``sites`` how many batch norms have each status,
    ``notes`` what could not be compared and why.
    """

    model: str
    factor: float
    comparisons: list[Comparison] = field(default_factory=list)
    sites: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything that was compared is within its limit (and something was)."""
        return bool(self.comparisons) and all(c.ok for c in self.comparisons)

    @property
    def failures(self) -> list[Comparison]:
        """The comparisons beyond their limits, in the order in which they were made."""
        return [c for c in self.comparisons if not c.ok]

    @property
    def worst(self) -> Comparison | None:
        """The tensor with the largest error / limit, in the first step that failed: later ones inherit."""
        failures = self.failures
        if not failures:
            return _worst(self.comparisons)
        first = failures[0]
        return _worst(c for c in failures if (c.stage, c.step) == (first.stage, first.step))

    @property
    def failed_kinds(self) -> tuple[str, ...]:
        """What is wrong in the first step that failed; gradients alone mean a wrong backward."""
        failures = self.failures
        kinds = {c.kind for c in failures if (c.stage, c.step) == (failures[0].stage, failures[0].step)}
        return tuple(kind for kind in KINDS if kind in kinds)

    def summary(self) -> list[Comparison]:
        """The worst comparison of each stage and kind."""
        groups: dict[tuple[str, str], list[Comparison]] = {}
        for c in self.comparisons:
            groups.setdefault((c.stage, c.kind), []).append(c)
        stages = list(dict.fromkeys(stage for stage, _ in groups))
        ordered = sorted(groups, key=lambda key: (stages.index(key[0]), KINDS.index(key[1])))
        return [worst for key in ordered if (worst := _worst(groups[key])) is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps (infinities and NaNs as strings)."""
        worst = self.worst
        return {
            "model": self.model,
            "ok": self.ok,
            "factor": self.factor,
            "sites": self.sites,
            "compared": len(self.comparisons),
            "worst": None if worst is None else _plain(worst),
            "summary": [_plain(c) for c in self.summary()],
            "failures": [_plain(c) for c in self.failures],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        verdict = "equivalent" if self.ok else "NOT equivalent" if self.comparisons else "nothing was compared"
        lines = [
            f"{self.model}: {verdict}, {len(self.comparisons)} tensors compared, {len(self.failures)} beyond limits"
        ]
        if self.worst is not None:
            lines.append(f"  worst: {self.worst}")
        lines += [f"  {'ok ' if c.ok else 'BAD'} {c}" for c in self.summary()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _worst(comparisons: Iterable[Comparison]) -> Comparison | None:
    return max(comparisons, key=lambda c: c.ratio, default=None)


def _plain(c: Comparison) -> dict[str, Any]:
    values = {"stage": c.stage, "step": c.step, "kind": c.kind, "name": c.name, "ok": c.ok}
    numbers = {"error": c.error, "limit": c.limit, "eager_error": c.eager_error}
    return values | {k: v if v is None or math.isfinite(v) else str(v) for k, v in numbers.items()}
