"""The convolution node, alone and behind a residual join, where it is a 2-D convolution of images (geometry.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from bnrestructure.core.aliases import alias, channels_last_buffer
from bnrestructure.core.edges import ConvGradients
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import ConvBackward, ConvForward, ConvResult, Kernels
from bnrestructure.kernels.folded.geometry import Folding
from bnrestructure.kernels.folded.views import View, delivered, folded, stand_in, unfolded

__all__ = ["backward", "forward", "images_of", "joins", "unsupported"]

def joins(folding: Folding | None) -> bool:
    """Whether a residual join can ride along: its gradient is due in the frames, too, that the convolution does not read."""
    return folding is not None and folding.step == 1


def unsupported(kernels: Kernels, folding: Folding, call: ConvForward | ConvBackward) -> str | None:
    """Why the device cannot answer the call of images, or None. Nothing is copied to find out."""
    try:
        return kernels.supports(images_of(folding, call, stand_in))
    except UnsupportedCallError as error:
        return str(error)


def images_of(folding: Folding, call: ConvForward | ConvBackward, view: View) -> Any:
    """The 2-D convolution's call, its activations seen through ``view``. What is accumulated to is left out.

    Raises UnsupportedCallError for tensors that do not fit each other.
    """
    x, gate, join = call.x, call.transform.gate, call.join
    if (reason := call.geometry.misfit(x.shape, call.weight.shape)) is not None:
        raise UnsupportedCallError(reason)
    gates = (gate, None if join is None else join.ty.gate)
    if any(g is not None and g.shape != x.shape[:2] for g in gates):
        raise UnsupportedCallError("the gate is not one factor a channel of each image")
    fold = folding.fold
    common: dict[str, Any] = {
        "x": view(folding.read(x), fold),
        "transform": folding.transform(call.transform, x.shape),
        "weight": folding.weight(call.weight),
        "cast": None if call.cast is None else folding.weight(call.cast),
        "geometry": folding.geometry,
        "join": None if join is None else replace(
            join, y=view(join.y, fold), ty=folding.transform(join.ty, x.shape), r=view(join.r, fold)
        ),
    }
    if isinstance(call, ConvForward):
        return replace(call, out=None if call.out is None else view(call.out, fold), **common)
    edge = call.edge if call.edge.y is None else replace(call.edge, y=view(call.edge.y, fold))
    return replace(call, dy=view(call.dy, fold), edge=edge, accumulate=None, **common)


def forward(kernels: Kernels, folding: Folding, call: ConvForward) -> ConvResult:
    """The result; with a join call.x holds the sum. The folding must read every frame then."""
    images = images_of(folding, call, folded)
    found: ConvResult = kernels.run(images)
    if call.join is not None:
        delivered(images.x, call.x)
    if call.out is not None:
        return found._replace(y=delivered(found.y, call.out))
    size = call.geometry.output_size(call.x.shape[2:], call.weight.shape[2:])
    return found._replace(y=unfolded(found.y, (call.x.shape[0], call.weight.shape[0], *size)))


def backward(kernels: Kernels, folding: Folding, call: ConvBackward) -> ConvGradients:
    """The gradients. Frames that the convolution does not read have none: they stay what they are in ``accumulate``, zeros without it."""
    x, accumulate = call.x, call.accumulate
    into = None if accumulate is None else folding.read(accumulate)
    images = images_of(folding, call, folded)
    found: ConvGradients = kernels.run(replace(images, accumulate=None if into is None else folded(into, folding.fold)))
    dx, dgate = found.dx, found.gate
    if dx is not None and call.join is None and accumulate is not None and into is not None:
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
    return found._replace(dx=dx, gate=dgate, weight=_weight_gradient(found.weight, call.weight))


def _weight_gradient(dw: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if dw is None else alias(dw.view(weight.shape))
