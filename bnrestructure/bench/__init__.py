"""Paired timings and peak memory of a restructured model against eager and torch.compile (``bnrestructure bench``)."""

from bnrestructure.bench.paired import PairedTimings, Spread, time_paired

__all__ = ["PairedTimings", "Spread", "time_paired"]
