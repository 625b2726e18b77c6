"""Triton kernels for NVIDIA GPUs (compute capability 8.0 and newer): drop-in replacements for kernels/reference.

Importing this package needs neither a GPU nor Triton: the modules behind the kernels are imported when one is first
asked for. ``supports`` says for a call's actual arguments why it needs the reference instead, ``unavailable_reason``
why no kernel can run here at all. Under TRITON_INTERPRET=1 the same kernels run, slowly, on CPU tensors: so they are
tested without a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Transform
from bnrestructure.kernels import tuning
from bnrestructure.kernels.choice import Choice
from bnrestructure.kernels.cuda.convolution_choice import choose, node_of
from bnrestructure.kernels.cuda.device import gpu_here, identify_machine, uses_tf32
from bnrestructure.kernels.cuda.limits import supports, unavailable_reason

if TYPE_CHECKING:
    from bnrestructure.kernels.cuda.convolution import conv_backward, conv_forward
    from bnrestructure.kernels.cuda.join import join_backward, join_forward
    from bnrestructure.kernels.cuda.max_pool import max_pool_backward, max_pool_forward
    from bnrestructure.kernels.cuda.residual import residual_backward, residual_forward
    from bnrestructure.kernels.cuda.statistics import (
        finalize_backward,
        finalize_forward,
        statistics_backward,
        statistics_forward,
    )
    from bnrestructure.kernels.cuda.sweeps import (
        normalise_backward,
        normalise_forward,
        squeeze_backward,
        squeeze_forward,
    )

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

_MODULES = {
    "conv": "convolution",
    "finalize": "statistics",
    "join": "join",
    "max": "max_pool",
    "normalise": "sweeps",
    "residual": "residual",
    "squeeze": "sweeps",
    "statistics": "statistics",
}


def __getattr__(name: str) -> Any:
    """A kernel, from the module that holds it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name.partition('_')[0]]}")
    return getattr(module, name)


def convolution_choices(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    transform: Transform,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    joined: bool = False,
) -> tuple[Choice, Choice]:
    """(forward, backward): what a convolution node will run on tensors of these shapes, computing in ``dtype``, and why.

    ``reference`` where no kernel here can. By rule where there is no GPU, or none that the node was measured on. Backward is
    meant with both the input's and the weight's gradient wanted. ``joined``: behind a residual join, formed and finished by the node.
    """
    tensors = torch.empty(x, dtype=dtype, device="meta"), torch.empty(weight, dtype=dtype, device="meta")
    dy = torch.empty(x[0], weight[0], *geometry.output_size(x[2:], weight[2:]), dtype=dtype, device="meta")
    forward = supports("conv_forward", (tensors[0], transform, tensors[1], None, geometry), {"dtype": dtype})
    backward = supports("conv_backward", (dy, BackwardEdge(), tensors[0], transform, tensors[1], geometry), {"dtype": dtype})
    found = []
    for direction, reason in (("forward", forward), ("backward", backward)):
        if reason is not None:
            found.append(Choice("reference", reason))
            continue
        gated, tf32 = transform.gate is not None, uses_tf32()
        node = node_of(x, weight, geometry, not transform.is_identity, gated, dtype, tf32, joined)
        found.append(choose(node, direction, gpu_here()))
    return found[0], found[1]


def description() -> str:
    """The GPU and where its tuned choices are kept, for ``doctor``."""
    gpu = gpu_here() or "no GPU"
    identify_machine(gpu)
    return f"{gpu}; {tuning.where_kept()}"
