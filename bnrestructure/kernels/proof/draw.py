"""Tensors for a kind of call: random numbers of the ranges that training has, in memory that shows what was written where."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnrestructure.kernels.calls import (
    Call,
    ConvBackward,
    ConvForward,
    FinalizeForward,
    JoinBackward,
    JoinForward,
    MaxPoolBackward,
    MaxPoolForward,
    StatisticsBackward,
)
from bnrestructure.kernels.operands import reach_of
from bnrestructure.kernels.proof.kinds import Blank, mapped
from bnrestructure.kernels.reference import REFERENCE

__all__ = ["Drawn"]

#: Elements of other memory before a tensor's first and behind its last: a multiple of what addresses are aligned to.
_MARGIN = 64
_MOMENTUM, _COUNT = 0.1, 64.0


class Drawn:
    """A call with tensors, the same ones for the same kind and seed; and whether anything but its outputs has been written since."""

    def __init__(self, blanks: Call[Any], device: torch.device, seed: int = 0) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device
        self._tensors: dict[int, tuple[str, Tensor, Tensor]] = {}  # number -> (field, tensor, all of its memory)
        call = mapped(blanks, Blank, self._tensor)
        self.call = _consistent(call)
        self._written = _written(self.call)
        self._before = {number: memory.clone() for number, (_, _, memory) in self._tensors.items()}

    def outputs(self) -> dict[str, Tensor]:
        """What the call writes to of its own arguments, by field."""
        return {name: x for name, x, _ in self._tensors.values() if name in self._written and name != "accumulate"}

    def stray_write(self) -> str | None:
        """The field in whose memory something was written that is none of the call's outputs; None where all is as it was."""
        for number, (name, x, memory) in self._tensors.items():
            before = self._before[number]
            if name in self._written:
                own = x.as_strided(x.shape, x.stride(), x.storage_offset())
                theirs = before.as_strided(x.shape, x.stride(), x.storage_offset())
                own.zero_()
                theirs.zero_()
            if not torch.equal(memory.view(torch.uint8), before.view(torch.uint8)):
                return name
        return None

    def _tensor(self, name: str, blank: Blank) -> Tensor:
        if blank.number in self._tensors:
            return self._tensors[blank.number][1]
        offset = _MARGIN + blank.offset // blank.dtype.itemsize
        shape = [1 if stride == 0 else size for size, stride in zip(blank.shape, blank.strides, strict=True)]
        empty = math.prod(blank.shape) == 0
        reach = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, blank.strides, strict=True))
        memory = self._numbers((offset + reach + _MARGIN,), blank.dtype)
        x = memory.as_strided(shape, blank.strides, offset)
        if not empty:
            x.copy_(self._values(name, shape, blank.dtype))
        x = x.expand(blank.shape).as_strided(blank.shape, blank.strides, offset)
        assert empty or offset + reach_of(x) <= memory.numel()
        self._tensors[blank.number] = (name, x, memory)
        return x

    def _numbers(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """Standard normal ones; zeros of a dtype that has none."""
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        return torch.randn(shape, generator=self._generator, device=self._device).to(dtype)

    def _values(self, name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        """Values for a field: variances above zero, factors and channels' means away from it, gradients and products of middling size."""
        x = self._numbers(shape, dtype)
        name = {"statistics[0]": "a", "statistics[1]": "b", "statistics[2]": "mean", "behind[1]": "var"}.get(name, name)
        match name:
            case "x" | "y" | "r" | "z" if len(shape) > 2:
                return x + 2 * self._numbers([1, shape[1], *[1] * (len(shape) - 2)], dtype)
            case "weight" if len(shape) > 2:
                return x / math.sqrt(math.prod(shape[1:]))
            case "weight" | "scale" | "s":
                return x.sign() * (1 + 0.2 * x.abs())
            case "var" | "running_var" | "rstd":
                return 0.5 + x.abs()
            case "partial":  # of means, small remainders and sums of squares
                return torch.stack([x[0], 1e-8 * x[1], x[2].square()])
            case "counts":
                return 1 + x.abs().ceil()
            case "gate":
                return x.sigmoid()
            case "dy" | "dz" | "dpooled" | "a" | "b":
                return 0.1 * x
            case "momentum":
                return torch.full_like(x, _MOMENTUM)
            case "count":
                return torch.full_like(x, _COUNT)
            case "out":
                return torch.full_like(x, torch.nan)
            case _:
                return x


def _consistent(call: Any) -> Any:
    """The call with what follows from other parts of it.

    That is a cast weight, an edge's gradients of statistics by their count, a join's sum behind that join, the places of a pool's maxima.
    """
    with torch.no_grad():
        edge = call if isinstance(call, StatisticsBackward) else getattr(call, "edge", None)
        if edge is not None and edge.count is not None:  # what is still to be divided must weigh something when it has been
            edge.a.mul_(edge.count / 2)
            edge.b.mul_(edge.count)
        if isinstance(call, ConvForward | ConvBackward) and call.cast is not None:
            call.cast.copy_(call.weight)
        if isinstance(call, ConvBackward) and call.join is not None:
            call.x.copy_(REFERENCE.run(JoinForward(call.join, call.x.dtype)).z)
        elif isinstance(call, ConvForward) and call.join is not None:
            call.x.fill_(torch.nan)
        elif isinstance(call, JoinBackward) and call.z is not None:
            call.z.copy_(REFERENCE.run(JoinForward(call.join, call.z.dtype)).z)
        elif isinstance(call, MaxPoolBackward):
            call.index.copy_(REFERENCE.run(MaxPoolForward(call.x, call.transform, call.geometry, call.x.dtype)).places)
    return replace(call, momentum=_MOMENTUM) if isinstance(getattr(call, "momentum", None), float) else call


def _written(call: Any) -> frozenset[str]:
    """The fields that the call may write to."""
    found = {"out", "accumulate", "running_mean", "running_var", "batches"}
    if isinstance(call, ConvForward) and call.join is not None:
        found.add("x")
    if isinstance(call, FinalizeForward) and call.unmerged is not None:
        found |= {"mean", "var"} if call.behind is None else {"behind[0]", "behind[1]"}
    if getattr(call, "accumulate", None) is not None and getattr(call, "dz", None) is call.accumulate:
        found.add("dz")
    return frozenset(found)
