"""Average pooling of a normalised tensor: a depthwise convolution whose filters are all ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnrestructure.core.activation import is_homogeneous
from bnrestructure.core.edges import ConvGeometry
from bnrestructure.ops import library
from bnrestructure.ops.conv import PlainConv
from bnrestructure.ops.conv_options import ConvOptions, check_shapes
from bnrestructure.ops.sweeps import PoolOutputs

__all__ = ["avg_pool"]


def avg_pool(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    beta: Tensor,
    *,
    act: str = "identity",
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    chain: bool = False,
    backend: str = "auto",
) -> PoolOutputs:
    """(average pool of ``act((x - mean) * scale + beta)`` in x's dtype, x passed through when chained).

    x [N, C, H, W] raw, the vectors [C]. Each window is divided by the number of positions of the whole kernel, padding (zeros after the
    activation) counted. That number divides ``scale`` and ``beta`` here, which is the same for a homogeneous activation: filters of
    ones are exact in every dtype, where 1/9 in bfloat16 is off by 0.2 %.

    Raises ValueError for an activation that is not homogeneous, RuntimeError on shapes that do not fit.
    """
    if not is_homogeneous(act):
        raise ValueError(f"the average of {act} of a tensor is not that of a multiple of it")
    positions = math.prod(kernel)
    channels = x.shape[1]
    weight = x.new_ones((channels, 1, *kernel))
    geometry = ConvGeometry(tuple(stride), tuple(padding), (1, 1), channels)
    check_shapes(x, weight, geometry)
    scale, beta = scale / positions, beta / positions
    if torch.compiler.is_compiling() and not chain:
        y, _, _ = library.conv(
            x, mean, scale, beta, act, None, weight, None, *geometry, statistics=False, dtype=x.dtype, backend=backend
        )
        return PoolOutputs(y, None)
    options = ConvOptions(act, geometry, False, chain, False, 0, None, None, x.dtype, backend)
    y, _, _, passed, _ = _AvgPool.apply(x, mean, scale, beta, None, weight, None, None, options)
    return PoolOutputs(y, passed)


class _AvgPool(PlainConv):
    """A name of its own, for whoever reads a profile."""
