"""C++ kernels for channels_last activations in fp32 and bf16: drop-in replacements for kernels/reference.

``supports`` says for a call's actual arguments why it needs the reference instead, ``unavailable_reason`` why no kernel
can run here at all (not compiled, say).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Transform
from bnrestructure.kernels import tuning
from bnrestructure.kernels.choice import Choice
from bnrestructure.kernels.cpu import convolution, depthwise, finalize, library, sweeps
from bnrestructure.kernels.cpu.convolution_choice import choose, identify_machine, instruction_set
from bnrestructure.kernels.cpu.finalize import finalize_backward, finalize_forward
from bnrestructure.kernels.cpu.join import join_backward, join_forward
from bnrestructure.kernels.cpu.library import unavailable_reason
from bnrestructure.kernels.cpu.sweeps import (
    max_pool_backward,
    max_pool_forward,
    normalise_backward,
    normalise_forward,
    residual_backward,
    residual_forward,
    squeeze_backward,
    squeeze_forward,
    statistics_backward,
    statistics_forward,
)
from bnrestructure.kernels.join import unsupported_part

__all__ = [
    "conv_backward",
    "conv_forward",
    "convolution_choices",
    "description",
    "finalize_backward",
    "finalize_forward",
    "join_backward",
    "join_forward",
    "max_pool_backward",
    "max_pool_forward",
    "normalise_backward",
    "normalise_forward",
    "residual_backward",
    "residual_forward",
    "squeeze_backward",
    "squeeze_forward",
    "statistics_backward",
    "statistics_forward",
    "supports",
    "unavailable_reason",
]


def conv_forward(
    x: Tensor, transform: Transform, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The fused convolution: see kernels/reference/convolution.py. Depthwise ones have kernels of their own."""
    return _convolutions(weight, geometry).conv_forward(x, transform, weight, bias, geometry, **options)


def conv_backward(
    dy: Tensor,
    edge: BackwardEdge,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    **options: Any,
) -> ConvGradients:
    """Gradients of :func:`conv_forward`: see kernels/reference/convolution.py."""
    return _convolutions(weight, geometry).conv_backward(dy, edge, x, transform, weight, geometry, **options)


def supports(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why kernel ``name`` cannot run with these arguments (``args[0]`` is a tensor), in one line, or None if it can."""
    if reason := unavailable_reason():
        return reason
    if name == "conv_forward":
        return _convolutions(args[2], args[4]).supports(name, args, kwargs)
    if name == "conv_backward":
        return _convolutions(args[4], args[5]).supports(name, args, kwargs)
    if name in ("join_forward", "join_backward"):
        return unsupported_part(supports, name, args, kwargs)
    if name in finalize.__all__:
        return finalize.supports(name, args, kwargs)
    return sweeps.supports(name, args, kwargs)


def convolution_choices(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    transform: Transform,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    joined: bool = False,
) -> tuple[Choice, Choice]:
    """(forward, backward): what a convolution node will run on tensors of these shapes, computing in ``dtype``, and why.

    ``reference`` where no kernel here can. Backward is meant with both the input's and the weight's gradient wanted. ``joined``: x is a
    residual join's sum.
    """
    tensors = torch.empty(x, dtype=dtype, device="meta"), torch.empty(weight, dtype=dtype, device="meta")
    reason = supports("conv_forward", (tensors[0], transform, tensors[1], None, geometry), {"dtype": dtype})
    if reason is not None:
        return Choice("reference", reason), Choice("reference", reason)
    if _convolutions(tensors[1], geometry) is depthwise:
        choice = Choice("depthwise", "depthwise convolutions have one kernel")
        return choice, choice
    node = convolution.node_of(x, weight, geometry, not transform.is_identity)
    here = instruction_set(), library.threads()
    return choose(node, dtype, "forward", *here), choose(node._replace(joined=joined), dtype, "backward", *here)


def description() -> str:
    """The instruction set in use, libraries that cannot be, and where tuned choices are kept, for ``doctor``."""
    identify_machine()
    return "; ".join([instruction_set(), *library.damaged().values(), tuning.where_kept()])


def _convolutions(weight: Tensor, geometry: ConvGeometry) -> ModuleType:
    """The module for this convolution: depthwise ones have kernels of their own."""
    return depthwise if geometry.is_depthwise(weight.shape) else convolution
