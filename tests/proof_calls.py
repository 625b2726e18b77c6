"""A call of every type, small, for the tests of kernels/proof."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, PoolGeometry, Transform
from bnrestructure.kernels import calls
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward, NormaliseForward
from bnrestructure.kernels.rounding import gradient_factor
from bnrestructure.kernels.unmerged import Unmerged

GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


def image(c: int = 16, size: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, c, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


def transform(c: int = 16, act: str = "relu") -> Transform:
    return Transform(torch.randn(c), 1 + torch.rand(c), torch.randn(c), act)


def forward(dtype: torch.dtype = torch.float32, **more: Any) -> ConvForward:
    weight = torch.randn(16, 16, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    return ConvForward(image(dtype=dtype), transform(), weight, None, GEOMETRY, dtype, True, **more)


def every_call(dtype: torch.dtype) -> dict[str, Call[Any]]:
    """A call of every type, and the awkward ones: slices of a buffer, one tensor in two places, a join."""
    x, t, weight = image(dtype=dtype), transform(), forward(dtype).weight
    vector, z = torch.rand(16) + 0.5, image(dtype=dtype)
    edge = BackwardEdge(vector, vector, vector, x, vector)
    undivided = BackwardEdge(vector.clone(), torch.rand(16), torch.rand(16), x, vector.clone(), 800_000)
    join = Join(image(dtype=dtype), transform(act="identity"), image(dtype=dtype), Transform(), "relu")
    gated = replace(join, ty=join.ty._replace(gate=torch.rand(3, 16)), tr=transform(act="identity"))
    pool = PoolGeometry((3, 3), (2, 2), (1, 1), False)
    buffer = torch.empty(3, 40, 9, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    gradient = torch.empty(3, 16, dtype=torch.float32)
    four = vector.clone(), vector, vector.clone(), vector.clone()
    left, counted = Unmerged(torch.rand(3, 31, 16), 243, 8), Unmerged(torch.rand(3, 2, 3), counts=torch.rand(2))
    same = image(dtype=dtype)
    pooled = image(size=5, dtype=dtype)
    return {
        "conv": forward(dtype),
        "conv, not merged": replace(forward(dtype), statistics="unmerged"),
        "conv into a slice": forward(dtype, out=buffer[:, 8:24]),
        "conv behind a join": ConvForward(torch.empty_like(x), Transform(), weight, None, GEOMETRY, dtype, True, join=join),
        "conv backward": ConvBackward(x, edge, x, t, weight, GEOMETRY, dtype, accumulate=image(dtype=dtype)),
        "conv backward behind a join": ConvBackward(x, edge, x, Transform(), weight, GEOMETRY, dtype, join=join),
        "conv backward, to be divided": ConvBackward(x, undivided, x, t, weight, GEOMETRY, dtype),
        "output gradient, to be divided": calls.OutputGradient(x, undivided, dtype, gradient_factor(True, dtype, torch.float32), bias=True),
        "expanded gradient": ConvBackward(x[:, :, :1, :1].expand(x.shape), edge, x, t, weight, GEOMETRY, dtype),
        "output gradient": calls.OutputGradient(x, edge, dtype, gradient_factor(True, dtype, torch.float32), bias=True),
        "join": calls.JoinForward(join, dtype, True),
        "join, not merged": calls.JoinForward(join, dtype, "unmerged"),
        "join backward": calls.JoinBackward(x, (vector, vector, vector), join, z),
        "join, gated": calls.JoinForward(gated, dtype),
        "join backward, gated": calls.JoinBackward(x, None, gated, z),
        "conv behind a gated join": ConvForward(torch.empty_like(x), Transform(), weight, None, GEOMETRY, dtype, join=gated),
        "conv backward behind a gated join": ConvBackward(x, edge, x, Transform(), weight, GEOMETRY, dtype, join=gated),
        "normalise": NormaliseForward(x, t, dtype, buffer[:, :16]),
        "normalise backward": calls.NormaliseBackward(z, x, t, image(dtype=dtype)),
        "statistics": calls.StatisticsForward(x),
        "statistics, not merged": calls.StatisticsForward(x, unmerged=True),
        "statistics, copying": calls.StatisticsForward(x, buffer[:, 16:32]),
        "statistics backward": calls.StatisticsBackward(x, vector, vector, vector),
        "statistics backward, to be divided": calls.StatisticsBackward(x, vector, torch.rand(16), torch.rand(16), None, 800_000),
        "squeeze": calls.SqueezeForward(x, t, dtype),
        "squeeze backward": calls.SqueezeBackward(gradient, same, x, t, same),
        "max pool": calls.MaxPoolForward(x, t, pool, dtype),
        "max pool backward": calls.MaxPoolBackward(pooled, torch.empty(pooled.shape, dtype=torch.uint8), x, t, pool),
        "finalize": calls.FinalizeForward(vector, vector.clone(), 243, vector.clone(), vector, vector.clone(), vector.clone(), 0.1, 1e-5),
        "finalize, counting": calls.FinalizeForward(
            vector, vector.clone(), 243, None, None, vector.clone(), vector.clone(), 0.1, 1e-5, torch.tensor(4)
        ),
        "finalize, averaging": calls.FinalizeForward(
            vector, vector.clone(), 243, None, None, vector.clone(), vector.clone(), None, 1e-5, torch.tensor(4)
        ),
        "finalize of a concat": calls.FinalizeForward(vector[:10], vector[:10], 243, *four, 0.1, 1e-5, None, (vector[10:], vector[10:])),
        "finalize, merging": calls.FinalizeForward(vector, vector.clone(), 243, *four, 0.1, 1e-5, None, None, left),
        "finalize of a concat, merging": calls.FinalizeForward(
            vector[:6].clone(), vector[:6].clone(), 243, vector[:9], *[None] * 3, 0.1, 1e-5, None, tuple(torch.rand(2, 3)), counted
        ),
        "finalize backward": calls.FinalizeBackward(vector, vector, vector, vector),
        "finalize backward, handed on": calls.FinalizeBackward(vector, vector, vector, vector, vector.clone(), vector.clone()),
    }
