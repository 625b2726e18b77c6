"""1-D and 3-D activations on the Triton kernels (kernels/folded), interpreted, against the reference in the same precision and in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.cpu_checks import assert_as_good, to_double
from torch import Tensor

from bnrestructure.core.aliases import channels_last_buffer
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, Transform
from bnrestructure.kernels import cuda, reference, registry

kernels = registry.folded(cuda)
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
    mean, _ = reference.statistics_forward(x)
    return Transform(mean, torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1]), act)


def double(value: Any) -> Any:
    if isinstance(value, Join):
        return replace(value, **{name: to_double(getattr(value, name)) for name in ("y", "ty", "r", "tr")})
    return to_double(value)


def check(name: str, *args: Any, **options: Any) -> None:
    def run(module: Any, convert: Any) -> Any:
        given = {k: convert(v.clone()) if isinstance(v, Tensor) else v for k, v in options.items()}
        if convert is double and "dtype" in given:
            given["dtype"] = torch.float64
        found = getattr(module, name)(*map(convert, args), **given)
        return tuple(found) if isinstance(found, tuple) else found

    assert kernels.supports(name, args, options) is None
    assert_as_good(name, run(kernels, lambda v: v), run(reference, lambda v: v), run(reference, double), 8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 2), (2, 5, 4), (4, 3)], ids=str)
def test_sweeps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dz = values(shape, dtype), values(shape, dtype)
    t = transform_of(x, "silu")
    check("statistics_forward", x)
    check("normalise_forward", x, t, dtype=dtype)
    check("normalise_backward", dz, x, t, accumulate=values(shape, dtype))
    if len(shape) > 2:
        check("squeeze_forward", x, t, dtype=dtype)
        check("squeeze_backward", torch.randn(shape[:2]).to(dtype), dz, x, t)
    plain = transform_of(x, "identity")
    check("residual_forward", x, plain, dz, Transform(), "relu", dtype=dtype, statistics=True)
    check("residual_backward", dz, None, x, plain, dz, Transform(), values(shape, dtype), "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, dtype: torch.dtype) -> None:
    shape, outputs, kernel, stride, padding = CONVOLUTIONS[name]
    geometry = ConvGeometry(stride, padding, (1,) * len(stride), 1)
    x, weight = values(shape, dtype), torch.randn(outputs, shape[1], *kernel) * 0.3
    y = values((shape[0], outputs, *geometry.output_size(shape[2:], kernel)), dtype)
    dy = values(tuple(y.shape), dtype)
    edge = BackwardEdge(*(torch.randn(3, outputs) * 0.2).unbind(), y, reference.statistics_forward(y)[0])
    t = transform_of(x, "silu")
    check("conv_forward", x, t, weight, torch.randn(outputs), geometry, dtype=dtype, statistics=True)
    check("conv_backward", dy, edge, x, t, weight, geometry, dtype=dtype, needs=(True, True, True), accumulate=values(shape, dtype))
    check("conv_backward", dy, edge, x, t, weight, geometry, dtype=dtype, needs=(True, True, False))
    join = Join(x, transform_of(x, "identity"), values(shape, dtype), Transform(), "silu")
    check("join_forward", join, weight.to(dtype), None, geometry, dtype=dtype, statistics=True)
    check("join_backward", dy, edge, values(shape, dtype), join, weight.to(dtype), geometry, dtype=dtype, needs=(True, False))
