"""Average pooling of a normalised tensor: a depthwise convolution whose filters are all ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnrestructure.core.activation import is_homogeneous
from bnrestructure.core.edges import ConvGeometry, PoolGeometry, Transform
from bnrestructure.ops import library
from bnrestructure.ops.conv import PlainConv
from bnrestructure.ops.conv_options import ConvOptions, check_shapes
from bnrestructure.ops.sweeps import PoolOutputs

__all__ = ["avg_pool"]


def avg_pool(
    x: Tensor, transform: Transform, geometry: PoolGeometry, *, chain: bool = False, backend: str = "auto"
) -> PoolOutputs:
    """(average pool of ``act((x - mean) * scale + beta)`` in x's dtype, x passed through when chained).

    x [N, C, H, W] raw, the vectors [C]. Each window is divided by the number of positions of the whole kernel, padding (zeros after the
    activation) counted. That number divides ``scale`` and ``beta`` here, which is the same for a homogeneous activation: filters of
    ones are exact in every dtype, where 1/9 in bfloat16 is off by 0.2 %.

    Raises ValueError for an activation that is not homogeneous and for ``ceil_mode``, whose last windows have another number of
    positions; RuntimeError on shapes that do not fit.
    """
    mean, scale, beta, act, _ = transform
    assert scale is not None  # an average pool without a batch norm before it is no node of ours
    assert beta is not None
    if not is_homogeneous(act):
        raise ValueError(f"the average of {act} of a tensor is not that of a multiple of it")
    if geometry.ceil_mode:
        raise ValueError("the windows of an average pool in ceil_mode have several divisors")
    positions = math.prod(geometry.kernel)
    channels = x.shape[1]
    weight = x.new_ones((channels, 1, *geometry.kernel))
    ones = ConvGeometry(geometry.stride, geometry.padding, (1, 1), channels)
    check_shapes(x, weight, ones)
    scale, beta = scale / positions, beta / positions
    if torch.compiler.is_compiling() and not chain:
        y, _, _ = library.conv(x, mean, scale, beta, act, None, weight, None, ones.flat, False, x.dtype, backend)
        return PoolOutputs(y, None)
    options = ConvOptions(act, ones, False, chain, False, 0, None, None, x.dtype, backend)
    y, _, _, passed, *_ = _AvgPool.apply(x, mean, scale, beta, None, weight, None, None, options)
    return PoolOutputs(y, passed)


class _AvgPool(PlainConv):
    """A name of its own, for whoever reads a profile."""
