"""Plain-PyTorch kernels: complete for every node, dtype and device; slow, obviously right, and the oracle of all others."""

from bnrestructure.kernels.reference.convolution import conv_backward, conv_forward
from bnrestructure.kernels.reference.join import join_backward, join_forward
from bnrestructure.kernels.reference.statistics import (
    finalize_backward,
    finalize_forward,
    statistics_backward,
    statistics_forward,
)
from bnrestructure.kernels.reference.sweeps import (
    max_pool_backward,
    max_pool_forward,
    normalise_backward,
    normalise_forward,
    residual_backward,
    residual_forward,
    squeeze_backward,
    squeeze_forward,
)

__all__ = [
    "conv_backward",
    "conv_forward",
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
]
