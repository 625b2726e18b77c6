"""The CPU sweeps against the reference kernels in fp64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from cpu_checks import KINKS, LAYOUTS, assert_as_good, in_layout, to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.activation import activate, activation_gradient
from bnrestructure.core.edges import PoolGeometry, Transform
from bnrestructure.kernels import cpu, reference
from bnrestructure.kernels.cpu import library

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
    mean, var = reference.statistics_forward(x)
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


def check(name: str, *args: object, **kwargs: object) -> None:
    """Runs ``name`` three times: CPU kernel, reference, reference in fp64. ``accumulate`` and ``out`` are copied."""

    def run(module: object, convert: object) -> object:
        fresh = {
            k: convert(v.clone(memory_format=torch.preserve_format)) if isinstance(v, Tensor) else v
            for k, v in kwargs.items()
        }
        if fresh.get("dtype") is not None and convert is to_double:
            fresh["dtype"] = torch.float64
        return getattr(module, name)(*[convert(a) for a in args], **fresh)

    assert cpu.supports(name, args, kwargs) is None
    assert_as_good(name, run(cpu, lambda v: v), run(reference, lambda v: v), run(reference, to_double))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = activation_tensor(shape, dtype, 0.5)
    mean, a, b = torch.randn(3, shape[1]).unbind()
    check("statistics_forward", x)
    check("statistics_backward", x, mean, a, b, None)
    accumulate = activation_tensor(shape, dtype)
    result = cpu.statistics_backward(x, mean, a, b, accumulate.clone())
    truth = reference.statistics_backward(*map(to_double, (x, mean, a, b, accumulate)))
    rounded = reference.statistics_backward(x, mean, a, b, accumulate.clone())
    assert_as_good("accumulated", result, rounded, truth)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_statistics_of_values_far_from_zero(isa: str, ratio: float) -> None:
    x = activation_tensor(LARGE, torch.float32, ratio)
    check("statistics_forward", x)


def test_statistics_of_images_far_from_each_other(isa: str) -> None:
    x = activation_tensor(LARGE, torch.float32)
    x += torch.tensor([1e4, -3e3, 0.0]).view(-1, 1, 1, 1)
    check("statistics_forward", x)


def test_statistics_see_nans_and_infinities(isa: str) -> None:
    x = activation_tensor((2, 5, 20, 20), torch.float32)
    x[1, 2, 3, 4], x[0, 3, 0, 0] = torch.nan, torch.inf
    mean, var = cpu.statistics_forward(x)
    expected_mean, expected_var = reference.statistics_forward(x)
    assert torch.equal(mean.isfinite(), expected_mean.isfinite())
    assert torch.equal(var.isfinite(), expected_var.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalise(isa: str, dtype: torch.dtype, act: str, shape: tuple[int, ...]) -> None:
    x = activation_tensor(shape, dtype, 1.0)
    for t in (affine_transform(x, act), Transform(act=act)):
        check("normalise_forward", x, t, dtype=dtype)
        g = away_from_kinks(activation_tensor(shape, dtype), input_of(x, t), act)
        check("normalise_backward", g, x, t)
        check("normalise_backward", g, x, t, accumulate=activation_tensor(shape, dtype))


def test_normalise_backward_with_a_mean_far_from_zero(isa: str) -> None:
    x = activation_tensor(LARGE, torch.float32, 1e4)
    t = affine_transform(x, "relu")
    check("normalise_backward", away_from_kinks(activation_tensor(LARGE, torch.float32), input_of(x, t), "relu"), x, t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)))
def test_layouts(isa: str, dtype: torch.dtype, layouts: tuple[str, str]) -> None:
    """Inputs and in-place outputs in any memory; what lies around a slice stays as it was."""
    shape = (2, 21, 5, 6)
    x = in_layout(activation_tensor(shape, dtype), layouts[0])
    g = in_layout(activation_tensor(shape, dtype), layouts[1])
    t = affine_transform(x, "silu")
    truth = reference.normalise_forward(to_double(x), to_double(t), dtype=torch.float64)
    rounded = reference.normalise_forward(x, t, dtype=dtype)
    out = in_layout(torch.zeros(shape, dtype=dtype), layouts[1])
    assert cpu.normalise_forward(x, t, dtype=dtype, out=out) is out
    assert_as_good("out", out, rounded, truth)

    accumulate = in_layout(activation_tensor(shape, dtype), layouts[0])
    expected = reference.normalise_backward(*map(to_double, (g, x, t)), accumulate=accumulate.double())
    rounded = reference.normalise_backward(g, x, t, accumulate=accumulate.clone())
    result = cpu.normalise_backward(g, x, t, accumulate=accumulate)
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
    value = cpu.normalise_forward(in_layout(u, "channels_last"), Transform(act=act), dtype=u.dtype)
    slope, _, _ = cpu.normalise_backward(torch.ones_like(u), in_layout(u, "channels_last"), Transform(act=act))
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
    value = cpu.normalise_forward(u, Transform(act=act), dtype=u.dtype).double()
    dx, _, _ = cpu.normalise_backward(g, u, Transform(act=act))
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
        check("residual_forward", y, ty, r, tr, act, dtype=dtype, statistics=False)
        check("residual_forward", y, ty, r, tr, act, dtype=dtype, statistics=True)
        out, _, _ = reference.residual_forward(y, ty, r, tr, act, dtype=dtype, statistics=False)
        u = input_of(y, ty) + input_of(r, tr)
        check("residual_backward", away_from_kinks(dout, u, act), None, y, ty, r, tr, out, act)
        if act not in KINKS:  # the statistics' gradient is not zero at a kink, so only smooth joins can be compared
            check("residual_backward", dout, (a, b, mean), y, ty, r, tr, out, act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_squeeze(isa: str, dtype: torch.dtype, act: str, shape: tuple[int, ...]) -> None:
    x = activation_tensor(shape, dtype, 0.3)
    dpooled = torch.randn(shape[:2]).to(dtype)
    for t in (affine_transform(x, act), Transform(act=act)):
        check("squeeze_forward", x, t, dtype=dtype)
        u = input_of(x, t)
        if act in KINKS:  # the pooled gradient reaches every element, so move the elements instead
            x = torch.where((away_from_kinks(torch.ones_like(u), u, act) == 0), x + 0.1, x)
        dz = activation_tensor(shape, dtype)
        check("squeeze_backward", dpooled, None, x, t)
        check("squeeze_backward", dpooled, dz, x, t)
        check("squeeze_backward", dpooled, dz, x, t, accumulate=activation_tensor(shape, dtype))
        expected = cpu.squeeze_backward(dpooled, dz, x, t)[0]
        result = cpu.squeeze_backward(dpooled, dz, x, t, accumulate=dz)[0]
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
        y, index = cpu.max_pool_forward(x, t, geometry, dtype=dtype)
        truth, _ = reference.max_pool_forward(to_double(x), to_double(t), geometry, dtype=torch.float64)
        rounded, _ = reference.max_pool_forward(x, t, geometry, dtype=dtype)
        assert_as_good("y", y, rounded, truth)
        u = input_of(x, t)
        dy = activation_tensor(y.shape, dtype)
        x_clear = torch.where((away_from_kinks(torch.ones_like(u), u, act) == 0), x + 0.1, x)
        check("max_pool_backward", dy, index, x_clear, t, geometry)
        check("max_pool_backward", dy, index, x_clear, t, geometry, accumulate=activation_tensor(shape, dtype))


@pytest.mark.parametrize("geometry", POOLS)
def test_max_pool_takes_the_first_of_equals_and_any_nan(isa: str, geometry: PoolGeometry) -> None:
    x = in_layout(torch.randint(-2, 3, (2, 19, 11, 12)).float(), "channels_last")
    x[:, :, 4, 5] = torch.nan
    x[1, 3] = -torch.inf
    t = Transform(act="relu") if geometry.kernel == (3, 3) else Transform()
    y, index = cpu.max_pool_forward(x, t, geometry, dtype=x.dtype)
    expected, expected_index = reference.max_pool_forward(x, t, geometry, dtype=x.dtype)
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
    y, index = cpu.max_pool_forward(x, t, geometry, dtype=dtype)
    dy = activation_tensor(y.shape, dtype)
    join = Transform(t.mean, t.scale, t.beta)
    calls = [
        ("statistics_forward", (x,), {}),
        ("normalise_backward", (g, x, t), {}),
        ("squeeze_forward", (x, t), {"dtype": dtype}),
        ("squeeze_forward", (x[:1], t), {"dtype": dtype}),
        ("squeeze_backward", (torch.randn(LARGE[:2]).to(dtype), g, x, t), {}),
        ("residual_forward", (x, join, g, Transform(), "silu"), {"dtype": dtype, "statistics": True}),
        ("residual_backward", (g, None, x, join, g, Transform(), x, "silu"), {}),
        ("max_pool_backward", (dy, index, x, t, geometry), {}),
    ]  # fmt: skip
    for name, args, kwargs in calls:
        check(name, *args, **kwargs)
        first, second = (getattr(cpu, name)(*args, **kwargs) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert (one is None and other is None) or torch.equal(one, other), name


def test_calls_from_several_python_threads_do_not_disturb_each_other() -> None:
    inputs = [activation_tensor((2, 30 + i, 40, 30), torch.float32, i) for i in range(4)]
    transforms = [affine_transform(x, "relu") for x in inputs]
    expected = [cpu.normalise_backward(x, x, t) for x, t in zip(inputs, transforms, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            result = cpu.normalise_backward(inputs[i], inputs[i], transforms[i])
            if not all(map(torch.equal, result, expected[i])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_supports_gives_reasons() -> None:
    x = torch.randn(2, 4, 3, 3)
    relu = Transform(act="relu")
    pool = PoolGeometry((16, 16), (1, 1), (0, 0), False)
    assert cpu.supports("normalise_forward", (x, relu), {"dtype": x.dtype}) is None
    refused = [
        ("statistics_forward", (x.double(),), {}),
        ("statistics_forward", (x[0],), {}),
        ("statistics_forward", (x[:0],), {}),
        ("statistics_forward", (x.to("meta"),), {}),
        ("normalise_forward", (x, relu), {"dtype": torch.bfloat16}),
        ("normalise_forward", (x, Transform(act="softplus")), {"dtype": x.dtype}),
        ("normalise_forward", (x, Transform(gate=torch.ones(2, 4))), {"dtype": x.dtype}),
        ("normalise_backward", (x.bfloat16(), x, relu), {}),
        ("residual_forward", (x, Transform(), x, Transform(), "softplus"), {"dtype": x.dtype, "statistics": False}),
        ("max_pool_forward", (x, relu, pool), {"dtype": x.dtype}),
    ]
    for name, args, kwargs in refused:
        reason = cpu.supports(name, args, kwargs)
        assert reason, name
        assert "\n" not in reason
