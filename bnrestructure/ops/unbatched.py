"""A convolution node whose input has no batch dimension, as PyTorch's convolutions allow: its parts one after the other.

A batch norm's channels are another dimension there than the convolution's (Conv2d on [C, H, W], then BatchNorm1d(H)), so that neither can
ride on the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.aliases import alias
from bnrestructure.core.edges import ConvGeometry, Transform, accumulation_dtype, per_channel
from bnrestructure.ops.dispatch import guard_second_derivative
from bnrestructure.ops.statistics import statistics
from bnrestructure.ops.sweeps import normalise

__all__ = ["unbatched_conv"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def unbatched_conv(
    x: Tensor, transform: Transform, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, *,
    wants_statistics: bool, chain: bool, gain: bool, backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, torch.Size | None, Tensor | None, Tensor | None]:  # fmt: skip
    """What ``ops.conv`` returns for x [C_in, *spatial]: y is [C_out, *spatial_out], and the vectors are of dimension 1 of their tensors.

    Raises what PyTorch's convolution raises.
    """
    z = x
    if not transform.is_identity:
        z = normalise(x, transform, backend=backend).z
    y = _CONVOLUTIONS[len(geometry.stride)](z, weight, bias, *geometry)
    mean = var = size = ones = None
    if wants_statistics:
        mean, var, size, *_ = statistics(y, backend=backend)
    if gain:
        y, ones = _Gain.apply(y)
    return y, mean, var, size, x if chain else None, ones


class _Gain(torch.autograd.Function):
    """y, and ones whose gradient is the factor s of y's backward edge."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return alias(y), torch.ones(y.shape[1], dtype=accumulation_dtype(y.dtype), device=y.device)

    @staticmethod
    def backward(ctx: Any, dy: Any, dgain: Any) -> Any:
        if dy is not None and dgain is not None:
            dy = (dy * per_channel(dgain, dy)).to(dy.dtype)
        return guard_second_derivative((dy,))
