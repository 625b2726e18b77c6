"""1-D and 3-D activations on the Triton kernels (kernels/folded), interpreted, against the reference in the same precision and in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.cpu_checks import assert_as_good, fresh, to_double
from torch import Tensor

from bnrestructure.core.aliases import channels_last_buffer
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.kernels.calls import (
    Call,
    ConvBackward,
    ConvForward,
    JoinBackward,
    JoinForward,
    NormaliseBackward,
    NormaliseForward,
    SqueezeBackward,
    SqueezeForward,
    StatisticsForward,
)
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.folded import FoldedKernels
from bnrestructure.kernels.reference import REFERENCE

kernels = FoldedKernels(KERNELS)
# x, outputs, kernel, stride, padding
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "1-D": ((2, 5, 7), 6, (3,), (2,), (1,)),
    "frames": ((1, 4, 2, 4, 3), 5, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    "every other frame": ((1, 4, 3, 4, 4), 5, (1, 1, 1), (2, 2, 2), (0, 0, 0)),
    "lines": ((1, 5, 4, 2, 3), 4, (3, 1, 1), (1, 1, 1), (1, 0, 0)),
    "volume": ((1, 3, 3, 4, 3), 5, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
}


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return channels_last_buffer(shape, dtype, torch.device("cpu")).copy_(torch.randn(shape) + 0.3)


def transform_of(x: Tensor, act: str) -> Transform:
    mean, _ = REFERENCE.run(StatisticsForward(x))
    return Transform(mean, torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1]), act)


def check(call: Call[Any]) -> None:
    def run(by: Any, of: Any) -> Any:
        found = by.run(fresh(of))
        return tuple(found) if isinstance(found, tuple) else found

    assert kernels.supports(call) is None
    assert_as_good(type(call).__name__, run(kernels, call), run(REFERENCE, call), run(REFERENCE, to_double(call)), 8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 2), (2, 5, 4), (4, 3)], ids=str)
def test_sweeps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dz = values(shape, dtype), values(shape, dtype)
    t = transform_of(x, "silu")
    check(StatisticsForward(x))
    check(NormaliseForward(x, t, dtype=dtype))
    check(NormaliseForward(x, t, dtype=dtype, r=values(shape, dtype)))
    check(NormaliseBackward(dz, x, t, accumulate=values(shape, dtype)))
    if len(shape) > 2:
        check(SqueezeForward(x, t, dtype=dtype))
        check(SqueezeBackward(torch.randn(shape[:2]).to(dtype), dz, x, t))
    plain = transform_of(x, "identity")
    check(JoinForward(Join(x, plain, dz, Transform(), "relu"), dtype, True))
    check(JoinBackward(dz, None, Join(x, plain, dz, Transform(), "silu"), values(shape, dtype)))
    gated = plain._replace(gate=torch.rand(shape[:2]))
    check(JoinForward(Join(x, gated, dz, Transform(), "relu"), dtype))
    check(JoinBackward(dz, None, Join(x, gated, dz, Transform(), "silu"), values(shape, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, dtype: torch.dtype) -> None:
    shape, outputs, kernel, stride, padding = CONVOLUTIONS[name]
    geometry = ConvGeometry(stride, padding, (1,) * len(stride), 1)
    x, weight = values(shape, dtype), torch.randn(outputs, shape[1], *kernel) * 0.3
    y = values((shape[0], outputs, *geometry.output_size(shape[2:], kernel)), dtype)
    dy = values(tuple(y.shape), dtype)
    edge = BackwardEdge(*(torch.randn(3, outputs) * 0.2).unbind(), y, REFERENCE.run(StatisticsForward(y))[0])
    t = transform_of(x, "silu")
    check(ConvForward(x, t, weight, torch.randn(outputs), geometry, dtype=dtype, statistics=True))
    check(ConvBackward(dy, edge, x, t, weight, geometry, dtype=dtype, needs=(True, True, True), accumulate=values(shape, dtype)))
    check(ConvBackward(dy, edge, x, t, weight, geometry, dtype=dtype, needs=(True, True, False)))
    join = Join(x, transform_of(x, "identity"), values(shape, dtype), Transform(), "silu")
    z, weight = values(shape, dtype), weight.to(dtype)
    check(ConvForward(values(shape, dtype), Transform(), weight, None, geometry, dtype, True, join=join))
    check(ConvBackward(dy, edge, z, Transform(), weight, geometry, dtype, (True, True, False), join=join))
