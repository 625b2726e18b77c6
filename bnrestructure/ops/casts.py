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

__all__ = ["Casts", "cast_ahead", "cast_weight"]


class _Cast(NamedTuple):
    """A weight's values in another dtype, as they were at one moment."""

    weight: Tensor
    version: int
    values: Tensor


class _Form(NamedTuple):
    """How kernels want a weight: ``by_tap`` [KH, KW, C] in memory, as depthwise ones do, or channels_last."""

    dtype: torch.dtype
    by_tap: bool

    def blank(self, weight: Tensor) -> Tensor:
        """Room for the weight in this form; with its own strides where they are of this form: such are copied together."""
        if self.by_tap:
            channels, one, *kernel = weight.shape
            return torch.empty(*kernel, one, channels, dtype=self.dtype, device=weight.device).permute(3, 2, 0, 1)
        if weight.is_contiguous(memory_format=torch.channels_last):
            return torch.empty_strided(weight.shape, weight.stride(), dtype=self.dtype, device=weight.device)
        return torch.empty(weight.shape, dtype=self.dtype, device=weight.device, memory_format=torch.channels_last)

    def of(self, weight: Tensor) -> Tensor:
        """The weight's values in this form."""
        return self.blank(weight).copy_(weight.detach())


class Casts:
    """Which weights a program's last run has cast, and to what: its next run casts those before anything else."""

    def __init__(self) -> None:
        self.wanted: list[tuple[weakref.ref[Tensor], _Form]] = []


class _Run:
    """One run of a program: what was cast ahead, and what its convolutions ask for."""

    def __init__(self, wanted: Iterable[tuple[weakref.ref[Tensor], _Form]]) -> None:
        self._ready: dict[tuple[int, _Form], _Cast] = {}
        self.asked: dict[tuple[int, _Form], weakref.ref[Tensor]] = {}
        alike: dict[tuple[torch.device, torch.dtype, _Form], list[Tensor]] = defaultdict(list)
        for reference, form in wanted:
            if (weight := reference()) is not None:
                alike[weight.device, weight.dtype, form].append(weight)
        for (_, _, form), weights in alike.items():
            values = [form.blank(weight) for weight in weights]
            with torch.no_grad():
                torch._foreach_copy_(values, weights)
            for weight, cast in zip(weights, values, strict=True):
                self._ready[id(weight), form] = _Cast(weight, weight._version, cast)

    def cast(self, weight: Tensor, form: _Form) -> Tensor:
        """The weight's values in this form."""
        if type(weight) in (Tensor, nn.Parameter) and weight.is_leaf and not weight.is_inference():
            self.asked[id(weight), form] = weakref.ref(weight)
            found = self._ready.get((id(weight), form))
            if found is not None and found.version == weight._version:  # nothing in the graph has written to it since
                return found.values
        return form.of(weight)


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
    casts.wanted = [(reference, form) for (_, form), reference in run.asked.items()]


def cast_weight(weight: Tensor, dtype: torch.dtype, geometry: ConvGeometry) -> Tensor | None:
    """A 2-D convolution's weight in the dtype of its node, in the form that kernels want, for forward and backward alike; None where it is
    in that form, or kernels cast it: the CPU's do, as they read it.
    """
    if weight.is_cpu or weight.dim() != 4:
        return None
    by_tap = geometry.is_depthwise(weight.shape)
    if weight.dtype == dtype and not by_tap:
        return None
    run: _Run | None = getattr(_state, "run", None)
    form = _Form(dtype, by_tap)
    return form.of(weight) if run is None else run.cast(weight, form)
