"""Triton kernels for NVIDIA GPUs (compute capability 8.0 and newer): drop-in replacements for kernels/reference.

Importing this package needs neither a GPU nor Triton: the modules behind the kernels are imported when one is first
asked for. ``supports`` says for a call's actual arguments why it needs the reference instead, ``unavailable_reason``
why no kernel can run here at all. Under TRITON_INTERPRET=1 the same kernels run, slowly, on CPU tensors: so they are
tested without a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bnrestructure.kernels.cuda.limits import supports, unavailable_reason

if TYPE_CHECKING:
    from bnrestructure.kernels.cuda.convolution import conv_backward, conv_forward
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
    "finalize_backward",
    "finalize_forward",
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
