"""A residual join and the convolution behind it out of the kernels that an implementation has for each: one after the other.

What every implementation does where it has nothing better, and the meaning of what is better. ``kernels`` is the implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.core.errors import UnexpectedTensorError
from bnrestructure.kernels.operands import require_fit

__all__ = ["JoinGradients", "join_backward", "join_forward", "unsupported_part"]

#: (G, SP, SPY, SPR, dweight, dbias): what ``residual_backward`` gives, and the gradients of the weight and of the bias or None.
JoinGradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def unsupported_part(
    supports: Callable[[str, tuple[Any, ...], dict[str, Any]], str | None], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Why an implementation that ``supports`` the halves as it says cannot run ``join_forward`` or ``join_backward``, or None."""
    if name == "join_forward":
        join, *convolution = args
        parts = {"residual_forward": join.operands, "conv_forward": (join.y, Transform(), *convolution)}
    else:
        dy, edge, z, join, *convolution = args
        parts = {
            "residual_backward": (z, None, *join.operands[:-1], z, join.act),
            "conv_backward": (dy, edge, z, Transform(), *convolution),
        }
    reasons = (supports(part, of, kwargs) for part, of in parts.items())
    return next((reason for reason in reasons if reason is not None), None)


def join_forward(
    kernels: Any, join: Join, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, *, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(z, out, mean, var): the join's sum z in ``dtype``, its convolution, and the statistics of that.

    ``options`` are those of ``conv_forward``: ``statistics`` and ``out``.
    """
    z, _, _ = kernels.residual_forward(*join.operands, dtype=dtype, statistics=False)
    return z, *kernels.conv_forward(z, Transform(), weight, bias, geometry, dtype=dtype, **options)


def join_backward(
    kernels: Any,
    dy: Tensor,
    edge: BackwardEdge,
    z: Tensor,
    join: Join,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    needs: tuple[bool, bool],
    **options: Any,
) -> JoinGradients:
    """Gradients of :func:`join_forward`; ``dy`` with its edge is that of the convolution's result, ``needs`` = (weight, bias).

    ``options`` are ``dtype``, and ``accumulate``: the other readers' gradient at z, which is added first; its memory may be used for G.
    """
    if join.r.shape != join.y.shape:
        raise UnexpectedTensorError(f"operands of a join {list(join.y.shape)} and {list(join.r.shape)}")
    require_fit(join.y, join.ty, join.tr)
    found = kernels.conv_backward(dy, edge, z, Transform(), weight, geometry, needs=(True, *needs), **options)
    gradients = kernels.residual_backward(found.dx, None, *join.operands[:-1], z, join.act)
    return *gradients, found.weight, found.bias
