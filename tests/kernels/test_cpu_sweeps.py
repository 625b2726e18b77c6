"""The CPU sweeps against the reference kernels in fp64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from cpu_checks import KINKS, LAYOUTS, assert_as_good, fresh, in_layout, to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.activation import activate, activation_gradient
from bnrestructure.core.edges import BackwardEdge, Join, PoolGeometry, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import (
    Call,
    JoinBackward,
    JoinForward,
    MaxPoolBackward,
    MaxPoolForward,
    NormaliseBackward,
    NormaliseForward,
    OutputGradient,
    SqueezeBackward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.cpu import KERNELS, library
from bnrestructure.kernels.reference import REFERENCE

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu(0.2)")
DTYPES = (torch.float32, torch.bfloat16)
# Odd channels, vectors with and without a tail, maps of one pixel, one image, and one large enough for eight threads.
SHAPES = ((2, 3, 5, 7), (1, 1, 1, 1), (4, 37, 1, 1), (1, 130, 3, 1), (2, 64, 6, 6), (3, 41, 40, 23))
LARGE = (3, 41, 40, 23)


@pytest.fixture(params=library.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use(request.param):
        yield request.param


@pytest.fixture
def set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def activation_tensor(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    return in_layout((torch.randn(shape, dtype=torch.float64) + offset).to(dtype), "channels_last")


def affine_transform(x: Tensor, act: str) -> Transform:
    mean, var = REFERENCE.run(StatisticsForward(x))
    channels = x.shape[1]
    return Transform(mean, torch.rand(channels) / (var + 1e-3).sqrt() + 0.1, torch.randn(channels), act)


def away_from_kinks(g: Tensor, u: Tensor, act: str) -> Tensor:
    """g, zero where fp32 and fp64 may disagree on the side of a kink."""
    near = torch.zeros_like(u, dtype=torch.bool)
    for kink in KINKS.get(act, ()):
        near |= (u - kink).abs() < 1e-4
    return torch.where(near, torch.zeros_like(g), g)


def input_of(x: Tensor, t: Transform) -> Tensor:
    """The activation's input in fp64."""
    if t.mean is None:
        return x.double()
    mean, scale, beta = (v.double().view(1, -1, 1, 1) for v in (t.mean, t.scale, t.beta))
    return (x.double() - mean) * scale + beta


def check(call: Call[Any]) -> None:
    """The call's result by the CPU kernels, judged by the reference's in fp64 and by its own error."""
    assert KERNELS.supports(call) is None
    results = KERNELS.run(fresh(call)), REFERENCE.run(fresh(call)), REFERENCE.run(to_double(call))
    assert_as_good(type(call).__name__, *results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = activation_tensor(shape, dtype, 0.5)
    mean, a, b = torch.randn(3, shape[1]).unbind()
    check(StatisticsForward(x))
    check(StatisticsBackward(x, mean, a, b))
    accumulate = activation_tensor(shape, dtype)
    result = KERNELS.run(StatisticsBackward(x, mean, a, b, accumulate.clone()))
    truth = REFERENCE.run(StatisticsBackward(*map(to_double, (x, mean, a, b, accumulate))))
    rounded = REFERENCE.run(StatisticsBackward(x, mean, a, b, accumulate.clone()))
    assert_as_good("accumulated", result, rounded, truth)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_statistics_of_values_far_from_zero(isa: str, ratio: float) -> None:
    x = activation_tensor(LARGE, torch.float32, ratio)
    check(StatisticsForward(x))


def test_statistics_of_images_far_from_each_other(isa: str) -> None:
    x = activation_tensor(LARGE, torch.float32)
    x += torch.tensor([1e4, -3e3, 0.0]).view(-1, 1, 1, 1)
    check(StatisticsForward(x))


def test_statistics_see_nans_and_infinities(isa: str) -> None:
    x = activation_tensor((2, 5, 20, 20), torch.float32)
    x[1, 2, 3, 4], x[0, 3, 0, 0] = torch.nan, torch.inf
    mean, var = KERNELS.run(StatisticsForward(x))
    expected_mean, expected_var = REFERENCE.run(StatisticsForward(x))
    assert torch.equal(mean.isfinite(), expected_mean.isfinite())
    assert torch.equal(var.isfinite(), expected_var.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalise(isa: str, dtype: torch.dtype, act: str, shape: tuple[int, ...]) -> None:
    x = activation_tensor(shape, dtype, 1.0)
    for t in (affine_transform(x, act), Transform(act=act)):
        check(NormaliseForward(x, t, dtype=dtype))
        g = away_from_kinks(activation_tensor(shape, dtype), input_of(x, t), act)
        check(NormaliseBackward(g, x, t))
        check(NormaliseBackward(g, x, t, accumulate=activation_tensor(shape, dtype)))
        factors = torch.rand(shape[0], 1).expand(shape[:2])
        check(NormaliseBackward(g, x, t, factors=factors.contiguous()))
        check(NormaliseBackward(g, x, t, accumulate=activation_tensor(shape, dtype), factor=0.5, factors=factors.contiguous()))


def test_normalise_backward_with_a_mean_far_from_zero(isa: str) -> None:
    x = activation_tensor(LARGE, torch.float32, 1e4)
    t = affine_transform(x, "relu")
    check(NormaliseBackward(away_from_kinks(activation_tensor(LARGE, torch.float32), input_of(x, t), "relu"), x, t))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)))
def test_layouts(isa: str, dtype: torch.dtype, layouts: tuple[str, str]) -> None:
    """Inputs and in-place outputs in any memory; what lies around a slice stays as it was."""
    shape = (2, 21, 5, 6)
    x = in_layout(activation_tensor(shape, dtype), layouts[0])
    g = in_layout(activation_tensor(shape, dtype), layouts[1])
    t = affine_transform(x, "silu")
    truth = REFERENCE.run(NormaliseForward(to_double(x), to_double(t), dtype=torch.float64))
    rounded = REFERENCE.run(NormaliseForward(x, t, dtype=dtype))
    out = in_layout(torch.zeros(shape, dtype=dtype), layouts[1])
    assert KERNELS.run(NormaliseForward(x, t, dtype=dtype, out=out)) is out
    assert_as_good("out", out, rounded, truth)

    accumulate = in_layout(activation_tensor(shape, dtype), layouts[0])
    expected = REFERENCE.run(NormaliseBackward(*map(to_double, (g, x, t)), accumulate=accumulate.double()))
    rounded = REFERENCE.run(NormaliseBackward(g, x, t, accumulate=accumulate.clone()))
    result = KERNELS.run(NormaliseBackward(g, x, t, accumulate=accumulate))
    assert result[0] is accumulate
    assert_as_good("accumulate", result, rounded, expected)
    for tensor, layout in ((out, layouts[1]), (accumulate, layouts[0])):
        if layout == "slice":
            buffer = tensor.as_strided((2, 28, 5, 6), tensor.stride(), tensor.storage_offset() - 3)
            assert buffer[:, :3].isnan().all()
            assert buffer[:, 24:].isnan().all()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_are_accurate(isa: str, act: str) -> None:
    """To a relative 1e-6: values down to 1e-2 (a tail's error grows with its exponent), derivatives down to 1."""
    u = torch.linspace(-9, 12, 40 * 997, dtype=torch.float64).float().view(1, 40, 997, 1)
    value = KERNELS.run(NormaliseForward(in_layout(u, "channels_last"), Transform(act=act), dtype=u.dtype))
    slope, *_ = KERNELS.run(NormaliseBackward(torch.ones_like(u), in_layout(u, "channels_last"), Transform(act=act)))
    for result, truth, floor in (
        (value, activate(u.double(), act), 1e-2),
        (slope, activation_gradient(torch.ones_like(u).double(), u.double(), act), 1.0),
    ):
        assert ((result - truth).abs() / truth.abs().clamp_min(floor)).max() < 1e-6


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_kinks_nans_and_extremes_are_pytorchs(isa: str, act: str) -> None:
    """NaN, +-0, the kinks, and values whose exponential over- or underflows; masked NaN gradients become zero."""
    values = [0.0, -0.0, 6.0, 3.0, -3.0, 1e-42, 90.0, -90.0, 105.0, -105.0, 3e9, -3e9, torch.nan]
    u = torch.tensor(values).view(1, -1, 1, 1).repeat(1, 3, 2, 2)
    g = torch.full_like(u, 0.7)
    g[..., 1] = torch.nan
    value = KERNELS.run(NormaliseForward(u, Transform(act=act), dtype=u.dtype)).double()
    dx, *_ = KERNELS.run(NormaliseBackward(g, u, Transform(act=act)))
    torch.testing.assert_close(value, activate(u.double(), act), equal_nan=True, rtol=1e-6, atol=1e-30)
    expected = activation_gradient(g.double(), u.double(), act)
    if act in ("relu6", "hardswish"):  # PyTorch's own vector and scalar loops disagree on the derivative at a NaN
        dx, expected = (torch.where(u.isnan(), 0, d) for d in (dx, expected))
    torch.testing.assert_close(dx.double(), expected, equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu", "silu", "hardswish"])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual(isa: str, dtype: torch.dtype, act: str, shape: tuple[int, ...]) -> None:
    y, r, dout = (activation_tensor(shape, dtype, 0.3) for _ in range(3))
    r = in_layout(r, "slice")
    a, b, mean = torch.randn(3, shape[1]).unbind()
    transforms = [(affine_transform(operand, "identity"), Transform()) for operand in (y, r)]
    for ty, tr in product(*transforms):
        join = Join(y, ty, r, tr, act)
        check(JoinForward(join, dtype, False))
        check(JoinForward(join, dtype, True))
        out, _, _ = REFERENCE.run(JoinForward(join, dtype, False))
        u = input_of(y, ty) + input_of(r, tr)
        check(JoinBackward(away_from_kinks(dout, u, act), None, join, out))
        if act not in KINKS:  # the statistics' gradient is not zero at a kink, so only smooth joins can be compared
            check(JoinBackward(dout, (a, b, mean), join, out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_squeeze(isa: str, dtype: torch.dtype, act: str, shape: tuple[int, ...]) -> None:
    x = activation_tensor(shape, dtype, 0.3)
    dpooled = torch.randn(shape[:2]).to(dtype)
    for t in (affine_transform(x, act), Transform(act=act)):
        check(SqueezeForward(x, t, dtype=dtype))
        u = input_of(x, t)
        if act in KINKS:  # the pooled gradient reaches every element, so move the elements instead
            x = torch.where((away_from_kinks(torch.ones_like(u), u, act) == 0), x + 0.1, x)
        dz = activation_tensor(shape, dtype)
        check(SqueezeBackward(dpooled, None, x, t))
        check(SqueezeBackward(dpooled, dz, x, t))
        check(SqueezeBackward(dpooled, dz, x, t, accumulate=activation_tensor(shape, dtype)))
        expected = KERNELS.run(SqueezeBackward(dpooled, dz, x, t))[0]
        result = KERNELS.run(SqueezeBackward(dpooled, dz, x, t, accumulate=dz))[0]
        assert result is dz, "dz that is also accumulate is overwritten"
        assert torch.equal(result, expected)


POOLS = (
    PoolGeometry((3, 3), (2, 2), (1, 1), False),
    PoolGeometry((2, 2), (2, 2), (0, 0), True),
    PoolGeometry((3, 2), (1, 3), (1, 0), True),
    PoolGeometry((5, 5), (3, 3), (2, 2), False),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu", "silu", "leaky_relu(0.2)"])
@pytest.mark.parametrize("geometry", POOLS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 37, 6, 9), (3, 64, 13, 13)])
def test_max_pool(isa: str, dtype: torch.dtype, act: str, geometry: PoolGeometry, shape: tuple[int, ...]) -> None:
    x = activation_tensor(shape, dtype)
    for t in (affine_transform(x, act), Transform(act=act)):
        y, index = KERNELS.run(MaxPoolForward(x, t, geometry, dtype=dtype))
        truth, _ = REFERENCE.run(MaxPoolForward(to_double(x), to_double(t), geometry, dtype=torch.float64))
        rounded, _ = REFERENCE.run(MaxPoolForward(x, t, geometry, dtype=dtype))
        assert_as_good("y", y, rounded, truth)
        u = input_of(x, t)
        dy = activation_tensor(y.shape, dtype)
        x_clear = torch.where((away_from_kinks(torch.ones_like(u), u, act) == 0), x + 0.1, x)
        check(MaxPoolBackward(dy, index, x_clear, t, geometry))
        check(MaxPoolBackward(dy, index, x_clear, t, geometry, accumulate=activation_tensor(shape, dtype)))


@pytest.mark.parametrize("geometry", POOLS)
def test_max_pool_takes_the_first_of_equals_and_any_nan(isa: str, geometry: PoolGeometry) -> None:
    x = in_layout(torch.randint(-2, 3, (2, 19, 11, 12)).float(), "channels_last")
    x[:, :, 4, 5] = torch.nan
    x[1, 3] = -torch.inf
    t = Transform(act="relu") if geometry.kernel == (3, 3) else Transform()
    y, index = KERNELS.run(MaxPoolForward(x, t, geometry, dtype=x.dtype))
    expected, expected_index = REFERENCE.run(MaxPoolForward(x, t, geometry, dtype=x.dtype))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index, expected_index)


@pytest.mark.usefixtures("set_threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(isa: str, threads: int, dtype: torch.dtype) -> None:
    """Right for any number of threads, and the same bits each time."""
    torch.set_num_threads(threads)
    x, g = activation_tensor(LARGE, dtype), activation_tensor(LARGE, dtype)
    t = affine_transform(x, "silu")
    geometry = POOLS[0]
    y, index = KERNELS.run(MaxPoolForward(x, t, geometry, dtype=dtype))
    dy = activation_tensor(y.shape, dtype)
    join = Join(x, Transform(t.mean, t.scale, t.beta), g, Transform(), "silu")
    calls: list[Call[Any]] = [
        StatisticsForward(x),
        NormaliseBackward(g, x, t),
        NormaliseBackward(g, x, t._replace(gate=torch.rand(LARGE[:2]))),
        SqueezeForward(x, t, dtype),
        SqueezeForward(x[:1], t, dtype),
        SqueezeBackward(torch.randn(LARGE[:2]).to(dtype), g, x, t),
        JoinForward(join, dtype, True),
        JoinBackward(g, None, join, x),
        MaxPoolBackward(dy, index, x, t, geometry),
        OutputGradient(g, BackwardEdge(t.mean, t.scale, t.beta, x, t.mean), dtype, 0.7, True),
    ]
    for call in calls:
        check(call)
        first, second = (KERNELS.run(call) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert (one is None and other is None) or torch.equal(one, other), type(call).__name__


def test_calls_from_several_python_threads_do_not_disturb_each_other() -> None:
    inputs = [activation_tensor((2, 30 + i, 40, 30), torch.float32, i) for i in range(4)]
    transforms = [affine_transform(x, "relu") for x in inputs]
    expected = [KERNELS.run(NormaliseBackward(x, x, t)) for x, t in zip(inputs, transforms, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            result = KERNELS.run(NormaliseBackward(inputs[i], inputs[i], transforms[i]))
            if not all(map(torch.equal, result[:3], expected[i][:3])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gates_and_factors(isa: str, dtype: torch.dtype, act: str, shape: tuple[int, ...]) -> None:
    x, dz = activation_tensor(shape, dtype, 0.3), activation_tensor(shape, dtype)
    for t in (affine_transform(x, act), Transform(act=act)):
        gated = t._replace(gate=torch.rand(shape[:2]) + 0.2)
        check(NormaliseForward(x, gated, dtype))
        check(NormaliseBackward(dz, x, gated, factor=1.7))
        check(NormaliseBackward(dz, x, gated, activation_tensor(shape, dtype)))
        check(NormaliseBackward(away_from_kinks(dz, input_of(x, t), act), x, t, factor=0.6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_with_an_activated_tensor(isa: str, dtype: torch.dtype, act: str, shape: tuple[int, ...]) -> None:
    """What is added, in any layout, is added to what would have been stored without it, before that is rounded."""
    x, r = activation_tensor(shape, dtype, 0.3), activation_tensor(shape, dtype)
    plain = affine_transform(x, act)
    for t in (plain, Transform(act=act), plain._replace(gate=torch.rand(shape[:2]) + 0.2)):
        exact = KERNELS.run(NormaliseForward(x.float(), t, torch.float32)).double()
        for added in (r, in_layout(r, "contiguous"), x):
            value = KERNELS.run(NormaliseForward(x, t, dtype, r=added))
            limit = torch.finfo(dtype).eps * torch.maximum(exact.abs(), added.double().abs()) * 2
            assert ((value.double() - (exact + added.double())).abs() <= limit).all()
            if act != "silu":  # where the sum is small, its error is the sigmoid's
                check(NormaliseForward(x, t, dtype, r=added))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_join_that_is_added_to(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    y, r, dz, z = (activation_tensor(shape, dtype, 0.3) for _ in range(4))
    join = Join(y, affine_transform(y, "identity"), r, Transform(), "silu")
    for layout in LAYOUTS:
        check(JoinBackward(dz, None, join, z, 1.4, in_layout(activation_tensor(shape, dtype), layout)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_gradient(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    p, y = activation_tensor(shape, dtype, 0.5), activation_tensor(shape, dtype)
    s, a, b, mean = torch.randn(4, shape[1]).unbind()
    full, undivided = BackwardEdge(s, a, b, y, mean), BackwardEdge(s, a * 5, b * 10, y, mean, 10)
    for edge in (full, undivided, BackwardEdge(None, a, b, y, mean), BackwardEdge(s), BackwardEdge()):
        check(OutputGradient(p, edge, dtype, 0.7, True))
        check(OutputGradient(in_layout(p, "slice"), edge, dtype))


def test_supports_gives_reasons() -> None:
    x = torch.randn(2, 4, 3, 3)
    relu, gated = Transform(act="relu"), Transform(gate=torch.ones(2, 4))
    pool = PoolGeometry((16, 16), (1, 1), (0, 0), False)
    assert KERNELS.supports(NormaliseForward(x, relu, x.dtype)) is None
    refused: list[Call[Any]] = [
        StatisticsForward(x.double()),
        StatisticsForward(x[0]),
        StatisticsForward(x[:0]),
        NormaliseForward(x, affine_transform(x, "relu"), torch.bfloat16),
        NormaliseForward(x, Transform(act="softplus"), x.dtype),
        SqueezeForward(x, gated, x.dtype),
        JoinForward(Join(x, Transform(), x, Transform(), "softplus"), x.dtype),
        MaxPoolForward(x, relu, pool, x.dtype),
    ]
    for call in refused:
        reason = KERNELS.supports(call)
        assert reason, call
        assert "\n" not in reason
        with pytest.raises((UnsupportedCallError, ValueError)):
            KERNELS.run(call)
