"""How far a tensor is from its truth, in a unit that does not blow up where the truth is zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["SMALL", "distances", "units"]

#: A tensor's unit of length is at least this part of the largest of its kind.
SMALL = 1e-3


def units(truths: dict[str, Tensor]) -> dict[str, float]:
    """For each tensor of one kind, the length by which its error is divided: ``max(||t||, SMALL * r * sqrt(numel))``.

    r is the largest root mean square among the tensors of this kind. Gradients that are zero in exact arithmetic (of a
    bias in front of a batch norm, say) are rounding noise in every implementation; they are measured against their
    neighbours and not against themselves. A fault of relative size 1e-9 / SMALL still shows in every tensor that is not
    smaller than 1e-9 * SMALL of its neighbours.
    """
    finite = {name: _finite_length(t.detach().double()) for name, t in truths.items() if t.is_floating_point()}
    roots = {name: length / math.sqrt(max(count, 1)) for name, (length, count) in finite.items()}
    largest = max(roots.values(), default=0.0)
    return {name: max(roots[name], SMALL * largest) * math.sqrt(max(count, 1)) for name, (_, count) in finite.items()}


def distances(value: Tensor, truth: Tensor, unit: float) -> float:
    """``||value - truth|| / unit`` over finite elements; infinite where shapes, or the places of NaNs and infinities, differ, and
    where one of the two needs a gradient: a user's loss may ask, and NumPy does.

    Integer tensors are equal (0) or not (infinite).
    """
    if value.shape != truth.shape or value.requires_grad != truth.requires_grad:
        return math.inf
    if not truth.is_floating_point():
        return 0.0 if torch.equal(value, truth) else math.inf
    if not value.numel():
        return 0.0
    value, truth = value.detach().double(), truth.detach().double()
    error = float(torch.linalg.vector_norm(value - truth))
    if not math.isfinite(error):
        good = torch.isfinite(truth)
        if not torch.equal(good, torch.isfinite(value)) or not _same_specials(value[~good], truth[~good]):
            return math.inf
        error = float(torch.linalg.vector_norm(value[good] - truth[good]))
    if error == 0.0:
        return 0.0
    return error / unit if unit > 0 else math.inf


def _same_specials(a: Tensor, b: Tensor) -> bool:
    """Whether NaNs and signed infinities agree elementwise."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _finite_length(t: Tensor) -> tuple[float, int]:
    """The length of t's finite elements, and how many these are."""
    length = float(torch.linalg.vector_norm(t))
    if not math.isfinite(length):  # which says so of an element at less cost than asking all of them
        t = t[torch.isfinite(t)]
        length = float(torch.linalg.vector_norm(t))
    return length, t.numel()
