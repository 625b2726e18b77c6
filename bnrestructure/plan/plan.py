"""The plan: one site per batch norm, where its halves went, and why whatever was left alone was left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Kernel", "Plan", "Site"]


@dataclass
class Site:
    """One batch norm of a model.

    name       the path of its module, or of the module that calls F.batch_norm
    pattern    where its halves are, e.g. ``conv-bn-relu-conv``
    status     ``fused`` (both halves ride on neighbours), ``partial`` (one does), ``kept`` (untouched)
    reason     why it is not fully fused; None when it is
    sweeps_before, sweeps_after    passes over its tensor in main memory in one training step, convolutions' own not counted
    bytes_before, bytes_after      the same in bytes, None where the shape is not known
    shape, dtype                   of the tensor that is normalised, None where not known
    ran        whether a training forward has run the rewritten program that holds it; None before there was one
    """

    name: str
    pattern: str
    status: str
    reason: str | None = None
    statistics: str | None = None
    normalise: str | None = None
    sweeps_before: int = 0
    sweeps_after: int = 0
    bytes_before: int | None = None
    bytes_after: int | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    ran: bool | None = None


@dataclass
class Kernel:
    """What one fused convolution runs, where its shapes are known.

    name         the path of the convolution
    shape        of its input, [N, C, *spatial]
    forward, backward    ``fused`` (prologue, product and epilogue in one kernel), ``hybrid`` (PyTorch's convolution, on a GPU
                 cuDNN's, between sweeps of ours), ``winograd`` (as fused, by Winograd's algorithm), ``depthwise``, ``reference``; for a
                 backward pass also one for each of its two products
    forward_reason, backward_reason    why this one: a measurement (``tune``), the rule, or what the kernels lack
    """

    name: str
    shape: tuple[int, ...]
    forward: str
    forward_reason: str
    backward: str
    backward_reason: str


@dataclass
class Plan:
    """What restructuring will do to a model or, once a training forward has run, what it did.

    regions     the parts of the model that run as rewritten graphs of their own
    captures    how often each part's forward has been captured in training
    """

    model: str
    sites: list[Site] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    captures: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many sites have each status."""
        counted = Counter(site.status for site in self.sites)
        return {status: counted[status] for status in ("fused", "partial", "kept")}

    @property
    def coverage(self) -> float:
        """The share of sites that are fully fused, 0 to 1; 1 for a model without batch norm."""
        return self.counts["fused"] / len(self.sites) if self.sites else 1.0

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason occurs, most frequent first."""
        return dict(Counter(site.reason for site in self.sites if site.reason is not None).most_common())

    @property
    def history(self) -> str | None:
        """What has run in training, in a line; None before any training forward."""
        if all(site.ran is None for site in self.sites):
            return None
        captures = ", ".join(f"{region} {count}" for region, count in self.captures.items())
        rewritten = sum(bool(site.ran) for site in self.sites)
        return f"{rewritten} of {len(self.sites)} ran rewritten in training; captures: {captures or 'none'}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {
            "model": self.model,
            "sites": [asdict(site) for site in self.sites],
            "regions": self.regions,
            "notes": self.notes,
            "captures": self.captures,
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "counts": self.counts,
            "coverage": self.coverage,
            "reasons": self.reasons,
        }

    def __str__(self) -> str:
        n = self.counts
        lines = [
            f"{self.model}: {len(self.sites)} BN layers, {n['fused']} fused, {n['partial']} partial, {n['kept']} kept "
            f"({self.coverage:.0%} fully fused)"
        ]
        lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        lines += [f"  {line}" for line in ([] if self.history is None else [self.history]) + self.notes]
        return "\n".join(lines)
