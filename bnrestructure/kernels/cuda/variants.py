"""Calls, on meta tensors, that between them launch every kernel variant that matters: what compile_ahead.py compiles.

Shapes are those of real networks at batch 256, because the tiles depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, PoolGeometry, Transform
from bnrestructure.kernels.calls import (
    ConvBackward,
    ConvForward,
    FinalizeBackward,
    FinalizeForward,
    JoinBackward,
    JoinForward,
    MaxPoolBackward,
    MaxPoolForward,
    NormaliseBackward,
    NormaliseForward,
    SqueezeBackward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.cuda import KERNELS

__all__ = ["VARIANTS", "Variant"]

_BATCH = 256


@dataclass(frozen=True)
class Variant:
    """A named call. ``quick`` ones are compiled in every run of the test-suite, for sm_80 and sm_90."""

    name: str
    run: Callable[[], object]
    quick: bool = False


def _pixels(c: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(_BATCH, c, size, size, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _vector(c: int) -> Tensor:
    return torch.empty(c, device="meta")


def _transform(c: int, act: str, gated: bool = False) -> Transform:
    gate = torch.empty(_BATCH, c, device="meta") if gated else None
    return Transform(_vector(c), _vector(c), _vector(c), act, gate)


def _weight(out: int, c: int, kernel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight in fp32, as autocast finds it, and as it is cast; channels_last both."""
    weight = torch.empty(out, c, kernel, kernel, device="meta").contiguous(memory_format=torch.channels_last)
    return weight, None if dtype is torch.float32 else weight.to(dtype)


def _convolution(
    name: str,
    c: int,
    out: int,
    kernel: int,
    size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    act: str | None = "relu",
    stride: int = 1,
    groups: int = 1,
    gated: bool = False,
    quick: bool = False,
    implementation: str = "fused",
) -> Variant:
    """Forward with statistics, then backward with an affine edge, accumulating into dx; with a bias' gradient where hybrid.

    Without ``act`` nothing is done to the input.
    """

    def run() -> None:
        geometry = ConvGeometry((stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
        x = _pixels(c, size, dtype)
        weight, cast = _weight(out, c // groups, kernel, dtype)
        transform = Transform() if act is None else _transform(c, act, gated)
        by = "depthwise" if geometry.is_depthwise(weight.shape) else implementation
        y, mean, _ = KERNELS.convolutions.by(by).run(ConvForward(x, transform, weight, None, geometry, dtype, True, cast=cast))
        edge = BackwardEdge(_vector(out), _vector(out), _vector(out), y, mean)
        needs = True, True, implementation == "hybrid"
        into = torch.empty_like(x)
        backward = ConvBackward(torch.empty_like(y), edge, x, transform, weight, geometry, dtype, needs, into, cast=cast)
        KERNELS.convolutions.by(by).run(backward)

    return Variant(name, run, quick)


def _join(
    name: str,
    c: int,
    out: int,
    kernel: int,
    size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    act: str = "relu",
    stride: int = 1,
    gated: bool = False,
    quick: bool = False,
    implementation: str = "fused",
) -> Variant:
    """A convolution behind a residual join, with and without a batch norm in the shortcut."""

    def run() -> None:
        geometry = ConvGeometry((stride,) * 2, (kernel // 2,) * 2, (1, 1), 1)
        y, r, z = (_pixels(c, size, dtype) for _ in range(3))
        weight, cast = _weight(out, c, kernel, dtype)
        for shortcut in (Transform(), _transform(c, "identity")):
            join = Join(y, _transform(c, "identity", gated), r, shortcut, act)
            forms = join if kernel == stride == 1 and implementation == "fused" else None
            forward = ConvForward(z, Transform(), weight, None, geometry, dtype, True, join=forms, cast=cast)
            made, mean, _ = KERNELS.convolutions.by(implementation).run(forward)
            edge = BackwardEdge(_vector(out), _vector(out), _vector(out), made, mean)
            dy, into, needs = torch.empty_like(made), torch.empty_like(z), (True, True, False)
            backward = ConvBackward(dy, edge, z, Transform(), weight, geometry, dtype, needs, into, join, cast)
            KERNELS.convolutions.by(implementation).run(backward)

    return Variant(name, run, quick)


def _sweeps() -> None:
    x = _pixels(256, 56, torch.bfloat16)
    a, b, c, d = (_vector(256) for _ in range(4))
    own = _transform(256, "identity")
    run = KERNELS.run
    mean, var = run(StatisticsForward(x))
    run(StatisticsForward(x, torch.empty_like(x)))
    run(StatisticsBackward(x, mean, a, b, None, 3136))
    run(StatisticsBackward(x, a, b, c, torch.empty_like(x)))
    z = run(NormaliseForward(x, _transform(256, "relu"), x.dtype))
    run(NormaliseBackward(z, x, _transform(256, "relu")))
    run(NormaliseBackward(z, x, _transform(256, "silu"), torch.empty_like(x)))
    gated = _transform(256, "identity")._replace(gate=torch.empty(x.shape[:2], device="meta"))
    run(NormaliseForward(x, gated, x.dtype))
    run(NormaliseForward(x, _transform(256, "silu"), x.dtype, r=z))
    run(NormaliseForward(x, gated, x.dtype, r=z))
    run(NormaliseBackward(z, x, gated))
    run(NormaliseBackward(z, x, own, factors=torch.empty(x.shape[:2], device="meta")))
    for shortcut in (Transform(), own):
        join = Join(x, own, z, shortcut, "relu")
        out, *_ = run(JoinForward(join, x.dtype, True))
        run(JoinBackward(out, (a, b, c), join, out))
        run(JoinForward(replace(join, ty=gated), x.dtype))
        run(JoinBackward(out, None, replace(join, ty=gated), out))
    pooled = run(SqueezeForward(x, _transform(256, "silu"), x.dtype))
    run(SqueezeBackward(pooled, z, x, _transform(256, "silu"), z))
    window = PoolGeometry((3, 3), (2, 2), (1, 1), False)
    y, index = run(MaxPoolForward(x, _transform(256, "relu"), window, x.dtype))
    run(MaxPoolBackward(y, index, x, _transform(256, "relu"), window))
    batches = torch.zeros((), dtype=torch.int64, device="meta")
    rstd, scale, *_ = run(FinalizeForward(mean, var, 1000, a, b, c, d, 0.1, 1e-5, batches))
    run(FinalizeBackward(a, b, rstd, scale))
    first, last = mean.split((mean.shape[0] - 32, 32)), var.split((mean.shape[0] - 32, 32))
    run(FinalizeForward(first[0], last[0], 1000, a, b, c, d, 0.1, 1e-5, batches, (first[1], last[1])))
    run(FinalizeBackward(a, b, rstd, scale, mean, var))
    left, _ = run(StatisticsForward(x, unmerged=True))
    run(FinalizeForward(mean, var, 1000, a, b, c, d, 0.1, 1e-5, batches, None, left))
    left = left._replace(partial=left.partial[:, :, :32].contiguous())
    run(FinalizeForward(first[0], last[0], 1000, a, b, c, d, 0.1, 1e-5, batches, (first[1], last[1]), left))


VARIANTS = (
    _convolution("1x1 bf16", 256, 128, 1, 28, quick=True),
    _convolution("1x1 narrow bf16", 64, 32, 1, 56),
    _convolution("1x1 late bf16", 1024, 512, 1, 7),
    _convolution("1x1 odd channels bf16", 130, 70, 1, 28),
    _convolution("1x1 channels in eights bf16", 72, 24, 1, 56, quick=True),
    _convolution("1x1 stride 2 bf16", 256, 512, 1, 56, stride=2),
    _convolution("1x1 gate silu bf16", 240, 40, 1, 28, act="silu", gated=True, quick=True),
    _convolution("1x1 fp16", 256, 128, 1, 28, dtype=torch.float16),
    _convolution("1x1 fp32", 256, 128, 1, 28, dtype=torch.float32),
    _convolution("3x3 bf16", 128, 128, 3, 28),
    _convolution("3x3 growth bf16", 128, 32, 3, 28),
    _convolution("3x3 stride 2 bf16", 128, 128, 3, 56, stride=2, quick=True),
    _convolution("3x3 plain bf16", 128, 128, 3, 28, act=None),
    _convolution("3x3 groups bf16", 128, 128, 3, 56, groups=32),
    _convolution("3x3 gelu bf16", 128, 128, 3, 28, act="gelu"),
    _convolution("3x3 fp32", 128, 128, 3, 28, dtype=torch.float32),
    _join("1x1 join bf16", 256, 64, 1, 56, quick=True),
    _join("1x1 late join bf16", 2048, 512, 1, 7),
    _join("1x1 linear join bf16", 32, 192, 1, 28, act="identity"),
    _join("1x1 join to few bf16", 64, 12, 1, 28),
    _join("1x1 join of few bf16", 16, 96, 1, 112, act="identity"),
    _join("1x1 join odd channels bf16", 130, 70, 1, 28),
    _join("1x1 join silu bf16", 128, 256, 1, 28, act="silu"),
    _join("1x1 gated join bf16", 256, 64, 1, 56, gated=True),
    _join("1x1 join fp16", 256, 64, 1, 56, dtype=torch.float16),
    _join("1x1 join fp32", 256, 64, 1, 56, dtype=torch.float32),
    _join("1x1 join stride 2 bf16", 256, 512, 1, 56, stride=2),
    _join("3x3 join bf16", 128, 128, 3, 28),
    _join("hybrid 3x3 join bf16", 256, 256, 3, 14, implementation="hybrid"),
    _convolution("7x7 stem bf16", 3, 64, 7, 224, stride=2, act=None),
    _convolution("depthwise 3x3 bf16", 144, 144, 3, 56, act="relu6", groups=144, quick=True),
    _convolution("depthwise channels in eights bf16", 72, 72, 3, 56, act="relu6", groups=72, quick=True),
    _convolution("depthwise 3x3 stride 2 bf16", 144, 144, 3, 56, act="silu", stride=2, groups=144),
    _convolution("depthwise 5x5 bf16", 240, 240, 5, 28, act="silu", groups=240),
    _convolution("depthwise 7x7 stride 2 bf16", 96, 96, 7, 56, act="silu", stride=2, groups=96),
    _convolution("depthwise 15x15 bf16", 128, 128, 15, 28, groups=128),
    _convolution("depthwise 3x3 gate fp16", 144, 144, 3, 28, act="hardswish", groups=144, gated=True, dtype=torch.float16),
    _convolution("depthwise 7x7 fp32", 96, 96, 7, 56, act="identity", groups=96, dtype=torch.float32),
    _convolution("hybrid 3x3 bf16", 256, 256, 3, 14, quick=True, implementation="hybrid"),
    Variant("sweeps bf16", _sweeps, quick=True),
)
