"""From distances to verdicts: what each tensor's error may be."""

from __future__ import annotations

import math
import statistics

import torch

from bnrestructure.verification.report import Comparison
from bnrestructure.verification.trial import Key, Trial, name_of

__all__ = ["FLOAT64_LIMIT", "FLOOR", "judge_double", "judge_training"]

#: Relative distance allowed in float64.
FLOAT64_LIMIT = 1e-9
#: Added to the limit in the training dtype, in units of that dtype's machine epsilon.
FLOOR = 4.0
#: The distance from which on zeros would be nearer to the truth.
_MEANINGLESS = 1.0


def judge_double(trial: Trial, rounded: list[Trial], factor: float) -> list[Comparison]:
    """The float64 stage: rounding and nothing else. ``rounded`` are of the original beside itself (trial.run_rounded): where its own
    rounding takes it further than the limit, no other order of rounding can be held to that. An infinite distance (a class that changed,
    a NaN that moved) is no measure."""
    spreads = [{key: error for key, error in t.double.items() if math.isfinite(error)} for t in rounded]
    means = _quadratic_means(spreads)
    found = []
    for key, error in trial.double.items():
        step, kind, _ = key
        own = max([spread.get(key, 0.0) for spread in spreads] + [means.get((step, kind), 0.0)])
        found.append(Comparison("float64", *key, error, max(FLOAT64_LIMIT, factor * own), own if rounded else None))
    return found


def judge_training(trials: list[Trial], dtype: torch.dtype, factor: float) -> list[Comparison]:
    """The training dtype's stage: our distance (the median of several trials) against eager's (the largest of them).

    Where eager's own numbers are meaningless nothing follows from ours: any finite distance is within the limit.
    """
    means = _quadratic_means([trial.eager for trial in trials])
    floor = FLOOR * torch.finfo(dtype).eps
    own = {key: max(trial.eager.get(key, 0.0) for trial in trials) for key in trials[0].ours}
    meaningless = _meaningless(own)
    found = []
    for key, eager in own.items():
        step, kind, _ = key
        ours = statistics.median(trial.ours.get(key, math.inf) for trial in trials)
        limit = factor * max(eager, means.get((step, kind), 0.0)) + floor
        if (step, kind) in meaningless and math.isfinite(ours):
            limit = math.inf
        found.append(Comparison(name_of(dtype), *key, ours, limit, eager))
    return found


def _meaningless(own: dict[Key, float]) -> set[tuple[int, str]]:
    """The steps and kinds of which most tensors are off by more than their own size.

    The median decides, and no single tensor: the gradient of a bias before a batch norm is nothing but rounding in every model.
    """
    groups: dict[tuple[int, str], list[float]] = {}
    for (step, kind, _), error in own.items():
        groups.setdefault((step, kind), []).append(error)
    return {group for group, errors in groups.items() if statistics.median(errors) > _MEANINGLESS}


def _quadratic_means(trials: list[dict[Key, float]]) -> dict[tuple[int, str], float]:
    """The quadratic mean distance over the tensors of each kind in each step; the largest of the trials."""
    means: dict[tuple[int, str], float] = {}
    for distances in trials:
        groups: dict[tuple[int, str], list[float]] = {}
        for (step, kind, _), error in distances.items():
            if math.isfinite(error):
                groups.setdefault((step, kind), []).append(error * error)
        for group, squares in groups.items():
            means[group] = max(means.get(group, 0.0), math.sqrt(sum(squares) / len(squares)))
    return means
