"""What crosses an edge between two fused nodes: a raw tensor and what its reader still has to do to it.

*Deferred normalisation* is the one abstraction of this project, in both directions::

    forward edge    x, Transform(mean, scale, beta, act, gate)    reader uses z  = act((x - mean) * scale + beta) * gate
    backward edge   P, BackwardEdge(s, a, b, y, mean)             reader uses dY = s * P + a * (y - mean) + b

All vectors are per channel, shape [C], in the *accumulation dtype* of the tensor they belong to: float64 for a float64
tensor, float32 for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.records import record

__all__ = [
    "BackwardEdge",
    "ConvGeometry",
    "ConvGradients",
    "Join",
    "PoolGeometry",
    "Transform",
    "accumulation_dtype",
    "divided",
    "per_channel",
    "statistics_count",
    "statistics_factors",
    "values_per_channel",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and per-channel vectors over tensors of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(vector: Tensor | None, like: Tensor) -> Tensor:
    """A [C] vector viewed so that it broadcasts over ``like`` of shape [N, C, *spatial]."""
    assert vector is not None  # an edge has all of its vectors or none
    return vector.view(1, -1, *([1] * (like.dim() - 2)))


def values_per_channel(size: torch.Size) -> int:
    """M of the formulas: how many values of a tensor of this size [N, C, *spatial] each channel has."""
    return size.numel() // size[1] if size[1] else 0


def statistics_factors(y: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """The backward edge's a = 2 dvar / M and b = dmean / M, from the gradients (None is zero) of y's statistics. ``mean`` is y's."""
    return divided(
        torch.zeros_like(mean) if dvar is None else dvar, torch.zeros_like(mean) if dmean is None else dmean, statistics_count(y)
    )


def statistics_count(y: Tensor) -> int:
    """What gradients of y's statistics are divided by; 1 for an empty batch, which has no pixel that these reach."""
    return max(values_per_channel(y.shape), 1)


def divided(dvar: Tensor, dmean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The backward edge's a and b of a tensor with ``count`` values of each channel."""
    a, b = torch._foreach_div((dvar, dmean), (count / 2.0, float(count)))  # one kernel for both on a GPU
    return a, b


class Transform(NamedTuple):
    """The forward edge: ``z = act((x - mean) * scale + beta) * gate``.

    ``mean``, ``scale`` and ``beta`` are all [C] or all None (then ``z = act(x) * gate``). ``gate`` is [N, C], a
    squeeze-and-excitation factor, or None for 1. A tuple, so that it can stand among the arguments of a graph's node.
    """

    mean: Tensor | None = None
    scale: Tensor | None = None
    beta: Tensor | None = None
    act: str = "identity"
    gate: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        """True when the reader may use the raw tensor as it is."""
        return self.mean is None and self.act == "identity" and self.gate is None

    @property
    def gives_sums(self) -> bool:
        """Whether the reader's backward takes the sums behind the vectors' gradients. With a gate they are left to what deferred x, which
        is the squeeze (``SqueezeBackward``).
        """
        return self.mean is not None and self.gate is None


@record
class BackwardEdge:
    """The backward edge: ``dY = s * P + a * (y - mean) + b``. ``s`` None is 1; ``a`` and ``b`` are both [C] or both None.

    ``y`` is the raw forward tensor (the producer's output) and ``mean`` its batch mean; both are needed only with ``a``. With ``count``,
    the values of each channel, a and b are the gradients of the variance and of the mean: a is still to be multiplied by ``2 / count``, and
    b by ``1 / count`` (see :func:`statistics_factors`). A GPU's kernels do that as they load them.
    """

    s: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    y: Tensor | None = None
    mean: Tensor | None = None
    count: int | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """a and b of the formula, where there are any."""
        assert self.a is not None
        assert self.b is not None
        return (self.a, self.b) if self.count is None else divided(self.a, self.b, self.count)


@record
class Join:
    """A residual join: ``z = act(((y - ty.mean) * ty.scale + ty.beta) * ty.gate + (r - tr.mean) * tr.scale + tr.beta)``.

    ``ty`` and ``tr`` are affine or the identity, and ``ty`` may have a gate; the activation is the join's.
    """

    y: Tensor
    ty: Transform
    r: Tensor
    tr: Transform
    act: str

    @property
    def operands(self) -> tuple[Tensor, Transform, Tensor, Transform, str]:
        """What ``residual_forward`` takes."""
        return self.y, self.ty, self.r, self.tr, self.act


class ConvGeometry(NamedTuple):
    """A convolution's shape parameters, one int per spatial dimension. Padding is zeros, put *after* the activation."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def flat(self) -> list[int]:
        """All the numbers in one list, as a registered operator takes them: ``ConvGeometry.of_flat`` reads it."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def of_flat(cls, numbers: Sequence[int]) -> ConvGeometry:
        """The geometry whose ``flat`` this is."""
        *vectors, groups = numbers
        n = len(vectors) // 3
        return cls(tuple(vectors[:n]), tuple(vectors[n : 2 * n]), tuple(vectors[2 * n :]), groups)

    @property
    def aten_arguments(self) -> tuple[Any, ...]:
        """What ATen's convolutions take after the bias."""
        return list(self.stride), list(self.padding), list(self.dilation), False, [0] * len(self.stride), self.groups

    def output_size(self, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the convolution's output."""
        sizes = zip(spatial, kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple([(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes])

    def misfit(self, x: Sequence[int], weight: Sequence[int]) -> str | None:
        """Why there is no convolution of tensors of these sizes, or None; PyTorch has words of its own for each case."""
        spatial = len(weight) - 2
        if len(x) != len(weight) or not len(self.stride) == len(self.padding) == len(self.dilation) == spatial > 0:
            return f"an input of sizes {list(x)}, a weight of sizes {list(weight)} and a stride of {len(self.stride)} numbers"
        if self.groups < 1 or x[1] != weight[1] * self.groups or weight[0] % self.groups:
            return f"a weight of sizes {list(weight)} in {self.groups} groups, for {x[1]} channels"
        if min(*self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            return f"a stride of {self.stride}, a dilation of {self.dilation} and a padding of {self.padding}"
        size = self.output_size(tuple(x[2:]), tuple(weight[2:]))
        return f"a result of size {size}" if min(size) < 1 else None

    def is_depthwise(self, weight: Sequence[int]) -> bool:
        """Whether every channel is a group of its own, with one output; ``weight`` is the weight's shape."""
        return self.groups > 1 and self.groups == weight[0] and weight[1] == 1

    def is_pointwise(self, weight: Sequence[int]) -> bool:
        """Whether each output pixel reads the input pixel at its own place, and no other; ``weight`` is the weight's shape."""
        return all(size == 1 for size in (*weight[2:], *self.stride)) and not any(self.padding)


class PoolGeometry(NamedTuple):
    """A pooling window, one int per spatial dimension; dilation is 1."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False

    def output_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the result; in ceil_mode the last window must start inside the input or its left padding."""
        sizes = []
        for n, k, s, p in zip(spatial, self.kernel, self.stride, self.padding, strict=True):
            size = (n + 2 * p - k + (s - 1 if self.ceil_mode else 0)) // s + 1
            sizes.append(size - 1 if self.ceil_mode and (size - 1) * s >= n + p else size)
        return tuple(sizes)


class ConvGradients(NamedTuple):
    """What a fused convolution's backward hands back. Members that were not asked for, or do not apply, are None.

    dx        gradient of the raw input x, [N, C, *spatial] in x's dtype: ``scale * P`` (P itself without a scale);
              with a gate, the gradient at the gate's input, ``G * gate``, mask *not* applied (see SqueezeBackward).
              Behind a residual join, G of that join: the gradient at the sum, mask applied, no scale.
    sum_p     SP = sum P, [C].                 sum_px    SPX = sum P * (x - mean), [C].
              Behind a join sum G and sum G * (y - ty.mean), None without such a mean.
    sum_pr    behind a join sum G * (r - tr.mean), [C], None without such a mean.
    gate      [N, C]: sum over the spatial positions of G * act(...).
    weight    the weight's shape, dtype and memory format.      bias      [C_out].
    """

    dx: Tensor | None = None
    sum_p: Tensor | None = None
    sum_px: Tensor | None = None
    gate: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    sum_pr: Tensor | None = None
