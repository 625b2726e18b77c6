"""The convolution node, alone and behind a residual join, where it is a 2-D convolution of images (geometry.py): the device's own kernels.

``kernels`` is the device's implementation throughout. Arguments and results mean what kernels/reference and kernels/join.py say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from bnrestructure.core.aliases import alias, channels_last_buffer
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.kernels.folded.geometry import Folding
from bnrestructure.kernels.folded.views import Fold, delivered, folded, stand_in, unfolded
from bnrestructure.kernels.join import JoinGradients

__all__ = ["conv_backward", "conv_forward", "join_backward", "join_forward", "unsupported"]

_View = Callable[[Tensor, Fold], Tensor]


def unsupported(kernels: Any, folding: Folding, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the device cannot run this kernel on the folded arguments, or None. Nothing is copied to find out."""
    given = args[0] if name == "conv_forward" else args[2] if name == "conv_backward" else None
    gate = None if given is None else (args[1] if name == "conv_forward" else args[3]).gate
    if gate is not None and gate.shape != given.shape[:2]:
        return "the gate is not one factor a channel of each image"
    if name == "conv_forward":
        x, transform, weight, bias, _ = args
        arguments: tuple[Any, ...] = (*_input(folding, x, transform, stand_in), folding.weight(weight), bias, folding.geometry)
    elif name == "conv_backward":
        dy, edge, x, transform, weight, _ = args
        arguments = (
            *_gradient(folding, dy, edge, stand_in), *_input(folding, x, transform, stand_in), folding.weight(weight), folding.geometry,
        )  # fmt: skip
    elif name == "join_forward":
        join, weight, bias, _ = args
        arguments = _join(folding, join, stand_in), folding.weight(weight), bias, folding.geometry
    else:
        dy, edge, z, join, weight, _ = args
        arguments = (
            *_gradient(folding, dy, edge, stand_in), stand_in(z, folding.fold), _join(folding, join, stand_in),
            folding.weight(weight), folding.geometry,
        )  # fmt: skip
    reason: str | None = kernels.supports(name, arguments, kwargs)
    return reason


def conv_forward(
    kernels: Any,
    folding: Folding,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var)."""
    into = None if out is None else folded(out, folding.fold)
    read = _input(folding, x, transform, folded)
    y, mean, var = kernels.conv_forward(*read, folding.weight(weight), bias, folding.geometry, out=into, **options)
    return _output(y, out, x, weight, geometry), mean, var


def conv_backward(
    kernels: Any,
    folding: Folding,
    dy: Tensor,
    edge: BackwardEdge,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    *,
    accumulate: Tensor | None = None,
    **options: Any,
) -> ConvGradients:
    """The gradients. Frames that the convolution does not read have none: they stay what they are in ``accumulate``, zeros without it."""
    into = None if accumulate is None else folding.read(accumulate)
    found: ConvGradients = kernels.conv_backward(
        *_gradient(folding, dy, edge, folded), *_input(folding, x, transform, folded), folding.weight(weight), folding.geometry,
        accumulate=None if into is None else folded(into, folding.fold), **options,
    )  # fmt: skip
    dx, dgate = found.dx, found.gate
    if dx is not None and accumulate is not None and into is not None:
        delivered(dx, into)
        dx = accumulate
    elif dx is not None and folding.step == 1:
        dx = unfolded(dx, x.shape)
    elif dx is not None:
        read = unfolded(dx, folding.read(x).shape)
        dx = alias(channels_last_buffer(tuple(x.shape), x.dtype, x.device)).zero_()
        folding.read(dx).copy_(read)
    if dgate is not None:
        dgate = dgate.view(x.shape[0], -1, dgate.shape[1]).sum(1)
    return found._replace(dx=dx, gate=dgate, weight=_weight_gradient(found.weight, weight))


def join_forward(
    kernels: Any,
    folding: Folding,
    join: Join,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(z, y, mean, var). The folding must read every frame."""
    into = None if out is None else folded(out, folding.fold)
    operands = _join(folding, join, folded)
    z, y, mean, var = kernels.join_forward(operands, folding.weight(weight), bias, folding.geometry, out=into, **options)
    return unfolded(z, join.y.shape), _output(y, out, join.y, weight, geometry), mean, var


def join_backward(
    kernels: Any,
    folding: Folding,
    dy: Tensor,
    edge: BackwardEdge,
    z: Tensor,
    join: Join,
    weight: Tensor,
    *,
    accumulate: Tensor | None = None,
    **options: Any,
) -> JoinGradients:
    """(G, SP, SPY, SPR, dweight, dbias). The folding must read every frame; ``accumulate``'s memory may become G's."""
    g, *sums, dweight, dbias = kernels.join_backward(
        *_gradient(folding, dy, edge, folded), folded(z, folding.fold), _join(folding, join, folded), folding.weight(weight),
        folding.geometry, accumulate=None if accumulate is None else folded(accumulate, folding.fold), **options,
    )  # fmt: skip
    sum_p, sum_py, sum_pr = sums
    return unfolded(g, z.shape), sum_p, sum_py, sum_pr, _weight_gradient(dweight, weight), dbias


def _input(folding: Folding, x: Tensor, transform: Transform, view: _View) -> tuple[Tensor, Transform]:
    return view(folding.read(x), folding.fold), folding.transform(transform, x.shape)


def _gradient(folding: Folding, dy: Tensor, edge: BackwardEdge, view: _View) -> tuple[Tensor, BackwardEdge]:
    return view(dy, folding.fold), edge if edge.y is None else replace(edge, y=view(edge.y, folding.fold))


def _join(folding: Folding, join: Join, view: _View) -> Join:
    return replace(join, y=view(join.y, folding.fold), r=view(join.r, folding.fold))


def _output(y: Tensor, out: Tensor | None, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    if out is not None:
        return delivered(y, out)
    size = geometry.output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
    return unfolded(y, (x.shape[0], weight.shape[0], *size))


def _weight_gradient(dw: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if dw is None else alias(dw.view(weight.shape))
