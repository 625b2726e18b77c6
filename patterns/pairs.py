"""The linear patterns: two neighbours of which one can ride on the other. The table at the end is all of them.

Forks, concats, residuals and squeeze-excite have files of their own.
"""

from __future__ import annotations

from torch import fx

from bnrestructure.core.activation import is_homogeneous
from bnrestructure.graph.activations import Activation, activation_of
from bnrestructure.graph.ir import Conv, Normalise, Residual, Statistics
from bnrestructure.graph.layers import ConvLayer, conv_of
from bnrestructure.graph.operations import AveragePooling, GlobalAverage, Pooling, concat_of, pooling_of
from bnrestructure.graph.splits import batch_norm_scaling_by
from bnrestructure.graph.words import describe
from bnrestructure.patterns.base import Pair, Refusal
from bnrestructure.patterns.concat import keeps_for_all

__all__ = [
    "ACTIVATION_CONV",
    "CONV_STATISTICS",
    "NORMALISE_ACTIVATION",
    "NORMALISE_CONV",
    "NORMALISE_POOL",
    "RESIDUAL_CONV",
    "RESIDUAL_STATISTICS",
    "bare_conv",
    "can_normalise",
    "is_average_of",
    "is_conv",
]


def conv_making(tensor: fx.Node) -> Conv | ConvLayer | Refusal:
    """The convolution that makes a tensor, fused already or not."""
    conv = Conv.making(tensor, "y")
    if conv is not None:
        return conv
    layer = conv_of(tensor)
    if isinstance(layer, ConvLayer):
        return layer
    return Refusal(tensor, layer or f"no convolution produces its input ({describe(tensor)} does)")


def residual_making(tensor: fx.Node) -> Residual | None:
    """The residual whose sum a tensor is."""
    return Residual.making(tensor, "out")


def single_residual(tensor: fx.Node) -> Residual | None:
    """The residual whose sum a tensor is, if nothing but the sum is wanted of it. A tensor added to itself has one gradient, not two."""
    residual = Residual.making(tensor, "out")
    single = residual is not None and residual.y is not residual.r and residual.outs().keys() == {"out"}
    return residual if single else None


def normalise_making(tensor: fx.Node) -> Normalise | None:
    """The normalise whose result a tensor is; none whose result is more than that."""
    normalise = Normalise.making(tensor, "z")
    return normalise if normalise is not None and normalise.is_plain else None


def plain_normalise(tensor: fx.Node) -> Normalise | None:
    """The normalise whose result a tensor is, if it has no activation yet."""
    normalise = normalise_making(tensor)
    return normalise if normalise is not None and normalise.act == "identity" else None


def activation_for_convs(tensor: fx.Node) -> Activation | None:
    """The activation whose result a tensor is, if convolutions are all that read it: otherwise it is in memory anyway."""
    activation = activation_of(tensor)
    return activation if activation is not None and all(is_conv(reader) for reader in tensor.users) else None


def is_conv(node: fx.Node) -> bool:
    """Whether the node is a convolution that is fused, or could be."""
    return Conv.of(node) is not None or isinstance(conv_of(node), ConvLayer)


def bare_conv(node: fx.Node) -> Conv | ConvLayer | None:
    """A convolution, fused already or not, that reads its input as it is."""
    conv = Conv.of(node)
    if conv is not None:
        return conv if conv.is_bare else None
    layer = conv_of(node)
    return layer if isinstance(layer, ConvLayer) else None


def fused_bare_conv(node: fx.Node) -> Conv | None:
    """A fused convolution that reads its input as it is, and as nothing else: a buffer to write into may be the same tensor."""
    conv = Conv.of(node)
    return conv if conv is not None and conv.is_bare and conv.times_read(conv.x) == 1 else None


def _need_not_be_made(normalise: Normalise, conv: Conv | ConvLayer) -> bool:
    """Whether a convolution had better normalise what it reads.

    Where a concat keeps the normalised tensor a fused convolution reads a slice of that: it has as much to read, and no activation to
    compute for each of its taps.
    """
    return isinstance(conv, ConvLayer) or not keeps_for_all(normalise.outs()["z"])


def can_normalise(normalise: Normalise, pooling: Pooling) -> bool:
    """Whether a pool of a tensor [N, C, H, W] could apply this normalise itself, the normalised tensor being needed by nobody else."""
    is_4d = _is_4d(normalise)
    if isinstance(pooling, GlobalAverage):
        return is_average_of(normalise, pooling) and len(pooling.input.users) == 1
    if isinstance(pooling, AveragePooling):
        return is_homogeneous(normalise.act) and is_4d is True
    return is_4d is not False


def is_average_of(normalise: Normalise, average: GlobalAverage) -> bool:
    """Whether this is a global average for as many dimensions as the normalise's tensor has."""
    is_4d = _is_4d(normalise)
    return is_4d is True or (is_4d is None and not average.only_4d)


def _is_4d(normalise: Normalise) -> bool | None:
    """Whether a normalise is of [N, C, H, W], by the class of its batch norm or the convolutions that made its input; None: nobody knows.

    A 2-D pool takes [N, C, L] for one image of N channels.
    """
    finalize = batch_norm_scaling_by(normalise.scale)
    if finalize is not None and finalize.dimensions:
        return finalize.dimensions == (4,)
    sizes = {_spatial_dimensions(segment) for segment in concat_of(normalise.x) or [normalise.x]} - {None}
    return 2 in sizes if sizes else None


def _spatial_dimensions(tensor: fx.Node) -> int | None:
    """The number of spatial dimensions of the convolution that made the tensor; None where none did."""
    conv = conv_making(tensor)
    return None if isinstance(conv, Refusal) else len(conv.stride)


# The paper's MVF: statistics as the epilogue of what makes the tensor.
CONV_STATISTICS = Pair(conv_making, Statistics.of)
RESIDUAL_STATISTICS = Pair(residual_making, Statistics.of)
# RCF and BNFF: normalisation and activation as the prologue of what reads the tensor.
NORMALISE_ACTIVATION = Pair(plain_normalise, activation_of, alone=True)
NORMALISE_CONV: Pair[Normalise, Conv | ConvLayer] = Pair(normalise_making, bare_conv, when=_need_not_be_made)
ACTIVATION_CONV = Pair(activation_for_convs, bare_conv)
NORMALISE_POOL = Pair(normalise_making, pooling_of, when=can_normalise)
# ICF: the sum of a residual formed by the convolution that reads it.
RESIDUAL_CONV = Pair(single_residual, fused_bare_conv, alone=True)
