"""A residual join and the convolution behind it out of the kernels that an implementation has for each: one after the other.

What every implementation does where it has nothing better, and the meaning of what is better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bnrestructure.core.edges import ConvGradients, Join, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import ConvBackward, ConvForward, ConvResult, JoinBackward, JoinForward, Kernels
from bnrestructure.kernels.operands import require_fit

__all__ = ["backward_in_turn", "forward_in_turn", "unsupported_part"]


def forward_in_turn(kernels: Kernels, conv: Callable[[ConvForward], ConvResult], call: ConvForward) -> ConvResult:
    """The join's sum, to call.x, by ``kernels``; then ``conv`` of it."""
    assert call.join is not None
    kernels.run(JoinForward(call.join, call.dtype, out=call.x))
    return conv(replace(call, join=None))


def backward_in_turn(kernels: Kernels, conv: Callable[[ConvBackward], ConvGradients], call: ConvBackward) -> ConvGradients:
    """The convolution's gradients by ``conv``; then the join's, of what that found for its sum, by ``kernels``."""
    join = call.join
    assert join is not None
    _require_fit(join)  # the convolution writes to ``accumulate``: the join must not find out then that it cannot go on
    found = conv(replace(call, transform=Transform(), join=None))
    if found.dx is None:
        return found
    g, sum_p, sum_py, sum_pr = kernels.run(JoinBackward(found.dx, None, join, call.x))
    return ConvGradients(g, sum_p, sum_py, None, found.weight, found.bias, sum_pr)


def unsupported_part(kernels: Kernels, call: ConvForward | ConvBackward) -> str | None:
    """Why ``kernels`` cannot run the parts of a convolution behind a join in turn, or None."""
    join = call.join
    assert join is not None
    part = JoinForward(join, call.dtype) if isinstance(call, ConvForward) else JoinBackward(call.x, None, join, call.x)
    return kernels.supports(part) or kernels.supports(replace(call, join=None))


def _require_fit(join: Join) -> None:
    if join.r.shape != join.y.shape or join.r.dtype != join.y.dtype:
        raise UnsupportedCallError(f"operands of a join {list(join.y.shape)} and {list(join.r.shape)}")
    require_fit(join.y, join.ty, join.tr)
