"""1-D and 3-D activations for the kernels of a device, which are 2-D inside: views of them (views.py), and calls of the same kernels.

A call of a kernel by name, ``FoldedKernels(device).conv_forward(...)``, takes and gives what kernels/reference does. Per-pixel kernels see
images of one long row block; convolutions are 2-D ones of other images (geometry.py, convolution.py), or ATen's between sweeps (volume.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Transform
from bnrestructure.kernels import join as in_turn
from bnrestructure.kernels.choice import Choice
from bnrestructure.kernels.folded import convolution, volume
from bnrestructure.kernels.folded.geometry import Folding, folding_of
from bnrestructure.kernels.folded.views import delivered, folded, image, stand_in, unfolded

__all__ = ["FoldedKernels"]


class _Sweep(NamedTuple):
    """Which arguments of a sweep are activations, which of them (or which keyword) is written in place, and whether it gives one first."""

    activations: tuple[int, ...]
    into: int | str | None
    gives: bool


_SWEEPS = {
    "statistics_forward": _Sweep((0,), None, False),
    "statistics_backward": _Sweep((0,), 4, True),
    "normalise_forward": _Sweep((0,), "out", True),
    "normalise_backward": _Sweep((0, 1), "accumulate", True),
    "residual_forward": _Sweep((0, 2), None, True),
    "residual_backward": _Sweep((0, 2, 4, 6), None, True),
    "squeeze_forward": _Sweep((0,), None, False),
    "squeeze_backward": _Sweep((1, 2), "accumulate", True),
}
#: Where a convolution's weight and geometry stand among its arguments.
_CONVOLUTIONS = {"conv_forward": (2, 4), "conv_backward": (4, 5), "join_forward": (1, 3), "join_backward": (4, 5)}


class FoldedKernels:
    """``kernels``, an implementation of 4-D kernels, for activations [N, C, *spatial] of any other number of dimensions."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def supports(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why these cannot run kernel ``name`` on these arguments, in one line, or None if they can."""
        if name in _CONVOLUTIONS:
            weight, geometry = (args[i] for i in _CONVOLUTIONS[name])
            folding = _folding(weight, geometry)
            if name.startswith("join") and not _joins(folding):
                return in_turn.unsupported_part(self.supports, name, args, kwargs)
            if folding is None:
                return volume.unsupported(self, name, args, kwargs)
            return convolution.unsupported(self.kernels, folding, name, args, kwargs)
        if name not in _SWEEPS:
            return f"{name} is for 4-D tensors"
        activations, into, _ = _SWEEPS[name]
        inside = list(args)
        for i in (*activations, into) if isinstance(into, int) else activations:
            if inside[i] is not None:
                inside[i] = stand_in(inside[i], image)
        reason: str | None = self.kernels.supports(name, tuple(inside), kwargs)
        return reason

    def __getattr__(self, name: str) -> Any:
        """A sweep."""
        if name not in _SWEEPS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

        def sweep(*args: Any, **kwargs: Any) -> Any:
            return self._sweep(name, *args, **kwargs)

        return sweep

    def _sweep(self, name: str, *args: Any, **kwargs: Any) -> Any:
        activations, place, gives = _SWEEPS[name]
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        into = given.get(place)
        sizes = given[activations[-1]].shape
        # What is given twice must stay one tensor: squeeze_backward overwrites an ``accumulate`` that is its ``dz``.
        inside: dict[int, Tensor] = {}
        for key in (*activations, place):
            tensor = given.get(key)
            if tensor is not None:
                given[key] = inside.setdefault(id(tensor), folded(tensor, image))
        found = getattr(self.kernels, name)(*[given[i] for i in range(len(args))], **{key: given[key] for key in kwargs})
        if not gives:
            return found
        first, rest = (found, ()) if isinstance(found, Tensor) else (found[0], tuple(found[1:]))
        first = unfolded(first, sizes) if into is None else delivered(first, into)
        return (first, *rest) if rest else first

    def conv_forward(
        self, x: Tensor, transform: Transform, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(y, mean, var): see kernels/reference/convolution.py."""
        folding = _folding(weight, geometry)
        if folding is None:
            return volume.conv_forward(self, x, transform, weight, bias, geometry, **options)
        return convolution.conv_forward(self.kernels, folding, x, transform, weight, bias, geometry, **options)

    def conv_backward(
        self, dy: Tensor, edge: BackwardEdge, x: Tensor, transform: Transform, weight: Tensor, geometry: ConvGeometry, **options: Any
    ) -> ConvGradients:
        """Gradients of :meth:`conv_forward`: see kernels/reference/convolution.py."""
        folding = _folding(weight, geometry)
        if folding is None:
            return volume.conv_backward(self, dy, edge, x, transform, weight, geometry, **options)
        return convolution.conv_backward(self.kernels, folding, dy, edge, x, transform, weight, **options)

    def join_forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(z, y, mean, var): see kernels/join.py."""
        _, weight, _, geometry = args
        folding = _folding(weight, geometry)
        if folding is None or not _joins(folding):
            return in_turn.join_forward(self, *args, **options)
        return convolution.join_forward(self.kernels, folding, *args, **options)

    def join_backward(self, *args: Any, **options: Any) -> in_turn.JoinGradients:
        """(G, SP, SPY, SPR, dweight, dbias): see kernels/join.py."""
        *_, weight, geometry = args
        folding = _folding(weight, geometry)
        if folding is None or not _joins(folding):
            return in_turn.join_backward(self, *args, **options)
        return convolution.join_backward(self.kernels, folding, *args[:-1], **options)

    def convolution_choices(
        self,
        x: tuple[int, ...],
        weight: tuple[int, ...],
        transform: Transform,
        geometry: ConvGeometry,
        dtype: torch.dtype,
        joined: bool = False,
    ) -> tuple[Choice, Choice]:
        """(forward, backward): what a convolution node will run on tensors of these shapes, computing in ``dtype``, and why."""
        folding = folding_of(tuple(weight[2:]), geometry)
        if folding is not None:
            of_images = folding.sizes(x), (*weight[:2], *folding.kernel), folding.transform(transform, x), folding.geometry
            choices: tuple[Choice, Choice] = self.kernels.convolution_choices(*of_images, dtype, joined and _joins(folding))
            return choices
        one = torch.empty(1, dtype=dtype)
        tensors = one.as_strided(x, [0] * len(x)), one.as_strided(weight, [0] * len(weight))
        reason = self.supports("conv_forward", (tensors[0], transform, tensors[1], None, geometry), {"dtype": dtype})
        choice = Choice("hybrid", "a 3-D kernel: ATen's product between sweeps") if reason is None else Choice("reference", reason)
        return choice, choice


def _folding(weight: Tensor, geometry: ConvGeometry) -> Folding | None:
    return folding_of(tuple(weight.shape[2:]), geometry)


def _joins(folding: Folding | None) -> bool:
    """Whether a residual join can ride along: its gradient is due in the frames, too, that the convolution does not read."""
    return folding is not None and folding.step == 1
