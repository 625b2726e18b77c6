"""Weights in the dtype that autocast has convolutions computed in: all those of a program by one kernel, not each by one of its own."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnrestructure.core.edges import ConvGeometry
from bnrestructure.core.memory_format import in_channels_last

__all__ = ["Casts", "cast_ahead", "cast_weight"]


class _Cast(NamedTuple):
    """A weight's values in another dtype, as they were at one moment."""

    weight: Tensor
    version: int
    values: Tensor


class Casts:
    """Which weights a program's last run has cast, and to what: its next run casts those before anything else."""

    def __init__(self) -> None:
        self.wanted: list[tuple[weakref.ref[Tensor], torch.dtype]] = []

    def __deepcopy__(self, memo: object) -> Casts:
        return Casts()


class _Run:
    """One run of a program: what was cast ahead, and what its convolutions ask for."""

    def __init__(self, wanted: Iterable[tuple[weakref.ref[Tensor], torch.dtype]]) -> None:
        self._ready: dict[tuple[int, torch.dtype], _Cast] = {}
        self.asked: list[tuple[weakref.ref[Tensor], torch.dtype]] = []
        alike: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Tensor]] = defaultdict(list)
        for reference, dtype in wanted:
            if (weight := reference()) is not None and weight.dtype != dtype:
                alike[weight.device, weight.dtype, dtype].append(weight)
        for (_, _, dtype), weights in alike.items():
            values = [_blank(weight, dtype) for weight in weights]
            with torch.no_grad():
                torch._foreach_copy_(values, weights)
            for weight, cast in zip(weights, values, strict=True):
                self._ready[id(weight), dtype] = _Cast(weight, weight._version, cast)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight's values in this dtype, channels_last."""
        if type(weight) in (Tensor, nn.Parameter) and weight.is_leaf and not weight.is_inference():
            self.asked.append((weakref.ref(weight), dtype))
            found = self._ready.get((id(weight), dtype))
            if found is not None and found.version == weight._version:  # nothing in the graph has written to it since
                return found.values
        return _cast(weight, dtype)


_state = threading.local()


@contextmanager
def cast_ahead(casts: Casts) -> Iterator[None]:
    """Within the block :func:`cast_weight` answers with what is cast here, at the block's beginning: what the last such block asked for."""
    before = getattr(_state, "run", None)
    run = _state.run = _Run(casts.wanted)
    try:
        yield
    finally:
        _state.run = before
    casts.wanted = run.asked


def cast_weight(weight: Tensor, dtype: torch.dtype, geometry: ConvGeometry) -> Tensor | None:
    """A 2-D convolution's weight in the dtype of its node, channels_last, for forward and backward alike; None where kernels cast it.

    The CPU's do, as they read it; so do depthwise ones, which lay it out in a way of their own.
    """
    if weight.dtype == dtype or weight.is_cpu or weight.dim() != 4 or geometry.is_depthwise(weight.shape):
        return None
    run: _Run | None = getattr(_state, "run", None)
    return _cast(weight, dtype) if run is None else run.cast(weight, dtype)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return in_channels_last(weight.detach().to(dtype))


def _blank(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for such a cast, with the weight's own strides where it is channels_last: those are copied together."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=weight.device)
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=torch.channels_last)
