"""Max pooling and the global average, interpreted, against the reference in the same precision and in fp64."""

from __future__ import annotations

import pytest
import torch
from kernels.cpu_checks import LAYOUTS, assert_as_good, in_layout, to_double
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.activation import PLAIN_ACTIVATIONS
from bnrestructure.core.edges import PoolGeometry, Transform
from bnrestructure.kernels.calls import MaxPoolBackward, MaxPoolForward, SqueezeBackward, SqueezeForward
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.reference import REFERENCE

ACTIVATIONS = (*PLAIN_ACTIVATIONS, "leaky_relu(0.1)")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POOLS = {
    "3x3 stride 2": PoolGeometry((3, 3), (2, 2), (1, 1), False),
    "2x2": PoolGeometry((2, 2), (2, 2), (0, 0), False),
    "overlapping": PoolGeometry((3, 2), (1, 1), (1, 0), False),
    "ceil": PoolGeometry((3, 3), (2, 2), (0, 0), True),
    "ceil with padding": PoolGeometry((2, 3), (3, 2), (1, 1), True),
    "gaps": PoolGeometry((1, 2), (3, 3), (0, 1), False),
}
SHAPE = (2, 5, 6, 7)


def draw(dtype: torch.dtype, act: str, layout: str = "channels_last", channels: int = 5) -> tuple[Tensor, Transform]:
    n, _, *size = SHAPE
    x = in_layout((torch.randn(n, channels, *size) + 3 * torch.randn(1, channels, 1, 1)).to(dtype), layout)
    return x, Transform(x.float().mean((0, 2, 3)), torch.rand(channels) + 0.5, torch.randn(channels), act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("name", POOLS)
def test_max_pool(name: str, channels: int, dtype: torch.dtype) -> None:
    """The same maxima from the same places; the gradient as near to fp64 as the reference's."""
    geometry = POOLS[name]
    x, t = draw(dtype, "relu", channels=channels)
    y, index = KERNELS.run(MaxPoolForward(x, t, geometry, dtype=dtype))
    expected, position = REFERENCE.run(MaxPoolForward(x, t, geometry, dtype=dtype))
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert index.dtype == torch.uint8
    assert (
        index == position
    ).float().mean() > 0.99  # (x - mean) * scale + beta may round to a tie in one and not in the other

    dy = torch.randn(y.shape).to(dtype)
    args = (dy, position, x, t)
    truth = REFERENCE.run(MaxPoolBackward(*map(to_double, args), geometry))
    assert_as_good("backward", *(k.run(MaxPoolBackward(*args, geometry)) for k in (KERNELS, REFERENCE)), truth)


def test_the_first_of_equal_maxima_is_taken() -> None:
    """relu makes many: a tie must fall where PyTorch's does."""
    x = torch.randint(-2, 3, SHAPE).float()
    for name, geometry in POOLS.items():
        index = KERNELS.run(MaxPoolForward(x, Transform(act="relu"), geometry, dtype=torch.float32))[1]
        assert torch.equal(
            index, REFERENCE.run(MaxPoolForward(x, Transform(act="relu"), geometry, dtype=torch.float32))[1]
        ), name


def test_max_pool_lets_nan_and_infinity_through() -> None:
    x = torch.randn(SHAPE)
    x[0, 0, 2, 2], x[1, 3], x[0, 4, 0, 1] = torch.nan, -torch.inf, torch.inf
    geometry = POOLS["3x3 stride 2"]
    y, index = KERNELS.run(MaxPoolForward(x, Transform(), geometry, dtype=torch.float32))
    expected, position = REFERENCE.run(MaxPoolForward(x, Transform(), geometry, dtype=torch.float32))
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(index, position)


@pytest.mark.parametrize("ceil", [False, True])
def test_output_sizes_are_torchs(ceil: bool) -> None:
    from bnrestructure.kernels.cuda.max_pool import _output_size

    for size in range(1, 12):
        for kernel in range(1, min(size, 5) + 1):
            for stride in (1, 2, 3):
                for padding in range(kernel // 2 + 1):
                    expected = F.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, ceil_mode=ceil).shape[2]
                    assert _output_size(size, kernel, stride, padding, ceil) == expected, (
                        size,
                        kernel,
                        stride,
                        padding,
                    )


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_squeeze_every_activation(act: str) -> None:
    check_squeeze(torch.float32, act, "channels_last")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_layouts_and_types(layout: str, dtype: torch.dtype) -> None:
    check_squeeze(dtype, "silu", layout)


def check_squeeze(dtype: torch.dtype, act: str, layout: str) -> None:
    x, t = draw(dtype, act, layout)
    truth = REFERENCE.run(SqueezeForward(x.double(), to_double(t), dtype=torch.float64))
    assert_as_good("forward", *(k.run(SqueezeForward(x, t, dtype)) for k in (KERNELS, REFERENCE)), truth)
    dpooled, dz = torch.randn(SHAPE[:2]).to(dtype), in_layout(torch.randn(SHAPE).to(dtype), layout)
    for gradient in (None, dz):
        args = (dpooled, gradient, x, t)
        truth = REFERENCE.run(SqueezeBackward(*map(to_double, args)))
        assert_as_good("backward", *(k.run(SqueezeBackward(*args)) for k in (KERNELS, REFERENCE)), truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_overwrites_the_gradient_it_read_and_adds_to_another(layout: str) -> None:
    x, t = draw(torch.float32, "silu", layout)
    dpooled, dz, other = torch.randn(SHAPE[:2]), torch.randn(SHAPE), torch.randn(SHAPE)
    expected = REFERENCE.run(SqueezeBackward(dpooled, dz, x, t))[0]
    own = in_layout(dz.clone(), layout)
    assert KERNELS.run(SqueezeBackward(dpooled, own, x, t, accumulate=own))[0] is own
    torch.testing.assert_close(own, expected)
    own = in_layout(other.clone(), layout)
    assert KERNELS.run(SqueezeBackward(dpooled, dz, x, t, accumulate=own))[0] is own
    torch.testing.assert_close(own, other + expected)
