"""1-D and 3-D activations for the kernels of a device, which are 2-D inside: views of them (views.py), and calls of the same kernels.

Per-pixel kernels see images of one long row block; convolutions are 2-D ones of other images (geometry.py, convolution.py), or ATen's
between sweeps (kernels/hybrid.py).
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, Join
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels import join as in_turn
from bnrestructure.kernels.calls import (
    Call,
    ConvBackward,
    ConvForward,
    JoinBackward,
    JoinForward,
    NormaliseBackward,
    NormaliseForward,
    OutputGradient,
    SqueezeBackward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.choice import Choice
from bnrestructure.kernels.device import DeviceKernels
from bnrestructure.kernels.folded import convolution
from bnrestructure.kernels.folded.geometry import folding_of
from bnrestructure.kernels.folded.views import View, delivered, folded, image, stand_in, unfolded
from bnrestructure.kernels.hybrid import Hybrid
from bnrestructure.kernels.rounding import narrowed

__all__ = ["FoldedKernels", "for_dimensions"]

R = TypeVar("R")


class _Sweep(NamedTuple):
    """Which fields of a sweep's call are activations, which of them is written in place, and whether its result has one in front."""

    activations: tuple[str, ...]
    into: str | None = None
    gives: bool = True


_SWEEPS: dict[type[Call[Any]], _Sweep] = {
    StatisticsForward: _Sweep(("x",), gives=False),
    StatisticsBackward: _Sweep(("x",), "accumulate"),
    NormaliseForward: _Sweep(("x", "r"), "out"),
    NormaliseBackward: _Sweep(("x", "dz"), "accumulate"),
    JoinForward: _Sweep(("join",), "out"),
    JoinBackward: _Sweep(("join", "dz", "z"), "accumulate"),
    SqueezeForward: _Sweep(("x",), gives=False),
    SqueezeBackward: _Sweep(("x", "dz"), "accumulate"),
    OutputGradient: _Sweep(("dy", "edge")),
}


@cache
def for_dimensions(kernels: DeviceKernels, dimensions: int) -> DeviceKernels | FoldedKernels:
    """What answers for activations of so many dimensions (vectors have one): a device's kernels, or views before them."""
    return kernels if dimensions in (4, 1) else FoldedKernels(kernels)


class FoldedKernels:
    """``kernels``, an implementation of 4-D kernels, for activations [N, C, *spatial] of any other number of dimensions."""

    def __init__(self, kernels: DeviceKernels) -> None:
        self.kernels = kernels
        self._volume = Hybrid(self)

    def supports(self, call: Call[Any]) -> str | None:
        """Why these cannot answer the call, in one line, or None. Nothing is copied to find out."""
        if type(call) in _SWEEPS:
            return self.kernels.supports(_images(call, stand_in))
        if not isinstance(call, ConvForward | ConvBackward):
            return f"{type(call).__name__} is for 4-D tensors"
        folding = folding_of(call.weight.shape[2:], call.geometry)
        if call.join is not None and not convolution.joins(folding):
            return in_turn.unsupported_part(self, call)
        if folding is None:
            return self._unsupported_volume(call)
        return convolution.unsupported(self.kernels, folding, call)

    def run(self, call: Call[R]) -> R:
        """The call's result. Raises UnsupportedCallError where these kernels cannot answer, before anything is written."""
        found: Any
        if isinstance(call, ConvForward):
            found = self._forward(call)
        elif isinstance(call, ConvBackward):
            found = self._backward(call)
        elif type(call) in _SWEEPS:
            found = self._sweep(call)
        else:
            raise UnsupportedCallError(f"{type(call).__name__} is for 4-D tensors")
        result: R = found
        return result

    def of_images(self, call: Call[Any]) -> ConvForward | ConvBackward | None:
        """The 2-D convolution of images that a convolution is done by; None of a call that is none, or is done otherwise.

        What is accumulated to is left out.
        """
        if not isinstance(call, ConvForward | ConvBackward):
            return None
        folding = folding_of(call.weight.shape[2:], call.geometry)
        if folding is None:
            return None
        alone = call if convolution.joins(folding) else replace(call, join=None)  # else the join has a sweep of its own
        found: ConvForward | ConvBackward = convolution.images_of(folding, alone, folded)
        return found

    def convolution_choices(self, call: ConvForward) -> tuple[Choice, Choice]:
        """(forward, backward): what a convolution node like this one will run, and why; tensors may be on the meta device."""
        folding = folding_of(call.weight.shape[2:], call.geometry)
        if call.join is not None and not convolution.joins(folding):
            call = replace(call, join=None)  # the join has a sweep of its own
        if folding is not None:
            return self.kernels.convolution_choices(convolution.images_of(folding, call, stand_in))
        reason = self._unsupported_volume(call)
        choice = Choice("hybrid", "a 3-D kernel: ATen's product between sweeps") if reason is None else Choice("reference", reason)
        return choice, choice

    def _forward(self, call: ConvForward) -> Any:
        folding = folding_of(call.weight.shape[2:], call.geometry)
        if call.join is not None and not convolution.joins(folding):
            return in_turn.forward_in_turn(self, self._forward, call)
        if folding is not None:
            return convolution.forward(self.kernels, folding, call)
        if (reason := self._unsupported_volume(call)) is not None:
            raise UnsupportedCallError(reason)
        return self._volume.forward(call)

    def _backward(self, call: ConvBackward) -> Any:
        folding = folding_of(call.weight.shape[2:], call.geometry)
        if call.join is not None and call.needs[0] and folding is not None and not convolution.joins(folding):
            return in_turn.backward_in_turn(self, self._backward, call)
        if folding is not None:
            return convolution.backward(self.kernels, folding, call)
        if (reason := self._unsupported_volume(call)) is not None:
            raise UnsupportedCallError(reason)
        return self._volume.backward(call)

    def _unsupported_volume(self, call: ConvForward | ConvBackward) -> str | None:
        """Why a convolution that is none of images cannot run here, or None."""
        x, weight, dtype = call.x, call.weight, call.dtype
        if call.transform.gate is not None:
            return "a gate before a kernel of several frames and pixels"
        if 0 in x.shape or 0 in weight.shape:
            return "an empty tensor"
        if weight.dtype.itemsize > dtype.itemsize and weight.dtype.itemsize > 4:
            return f"a weight in {weight.dtype}"
        reason = call.geometry.misfit(x.shape, weight.shape) or narrowed(x, call.transform, dtype)
        return reason or self.supports(NormaliseForward(x, call.transform, dtype))

    def _sweep(self, call: Call[Any]) -> Any:
        into = _SWEEPS[type(call)].into
        given = None if into is None else getattr(call, into)
        found = self.kernels.run(_images(call, folded))
        if isinstance(call, StatisticsForward) and call.out is not None:
            call.out.copy_(call.x)
        if not _SWEEPS[type(call)].gives:
            return found
        first = found if isinstance(found, Tensor) else found[0]
        first = unfolded(first, call.operand.shape) if given is None else delivered(first, given)
        return first if isinstance(found, Tensor) else type(found)(first, *found[1:])


def _images(call: Call[Any], view: View) -> Call[Any]:
    """A sweep's call with its activations as 4-D tensors."""
    activations, into, _ = _SWEEPS[type(call)]
    # What is given twice must stay one tensor: SqueezeBackward overwrites an ``accumulate`` that is its ``dz``.
    seen: dict[int, Tensor] = {}

    def seen_as(x: Tensor) -> Tensor:
        return seen.setdefault(id(x), view(x, image))

    changed: dict[str, Any] = {"out": None} if isinstance(call, StatisticsForward) else {}
    for field in fields(call):  # type: ignore[arg-type]
        value = getattr(call, field.name)
        if field.name not in activations and field.name != into:
            continue
        if isinstance(value, Tensor):
            changed[field.name] = seen_as(value)
        elif isinstance(value, Join):
            changed[field.name] = replace(value, y=seen_as(value.y), r=seen_as(value.r))
        elif isinstance(value, BackwardEdge) and value.y is not None:
            changed[field.name] = replace(value, y=seen_as(value.y))
    return replace(call, **changed)  # type: ignore[type-var]
