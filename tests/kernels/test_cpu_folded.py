"""1-D and 3-D activations on the CPU kernels (kernels/folded) against the reference kernels in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_checks import assert_as_good, to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.aliases import channels_last_buffer
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, PoolGeometry, Transform
from bnrestructure.kernels import cpu, reference, registry
from bnrestructure.kernels.folded.geometry import folding_of
from bnrestructure.kernels.folded.views import folded, frames, image, lines, unfolded

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]

kernels = registry.folded(cpu)
DTYPES = (torch.float32, torch.bfloat16)
#: Between nodes; a channel slice of a wider tensor; NCDHW; rows with gaps between them, which no view can fold.
LAYOUTS = ("last", "slice", "contiguous", "gaps")
SHAPES = ((2, 5, 3, 4, 6), (1, 3, 1, 1, 2), (3, 16, 2, 1, 5), (2, 37, 4, 5, 1), (1, 33, 1, 6, 3), (2, 5, 9), (4, 17, 1), (1, 3, 8), (6, 7))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x's values in one of LAYOUTS; NaN around them."""
    n, c, *spatial = x.shape
    if layout == "contiguous" or (layout == "gaps" and not spatial):
        return x.contiguous()
    wide = (n, c + 7 if layout == "slice" else c, *spatial)
    if layout == "gaps":
        wide = (*wide[:-1], wide[-1] * 2)
    buffer = channels_last_buffer(wide, x.dtype, x.device).fill_(torch.nan)
    view = {"last": buffer, "slice": buffer.narrow(1, 3 if layout == "slice" else 0, c), "gaps": buffer[..., ::2]}[layout]
    return view.copy_(x)


def values(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "last") -> Tensor:
    return laid_out((torch.randn(shape, dtype=torch.float64) + 0.3).to(dtype), layout)


def transform_of(x: Tensor, act: str = "silu", gate: bool = False) -> Transform:
    mean, var = reference.statistics_forward(x)
    c = x.shape[1]
    vectors = mean, torch.rand(c) / (var + 1e-2).sqrt() + 0.1, torch.randn(c)
    return Transform(*vectors, act, torch.rand(x.shape[0], c) + 0.5 if gate else None)


def edge_of(y: Tensor) -> BackwardEdge:
    mean, _ = reference.statistics_forward(y)
    c = y.shape[1]
    return BackwardEdge(torch.rand(c) + 0.5, torch.randn(c) * 0.1, torch.randn(c) * 0.1, y, mean)


def double(value: Any) -> Any:
    if isinstance(value, Join):
        return Join(*map(to_double, (value.y, value.ty, value.r, value.tr)), value.act)
    return to_double(value)


def like(x: Tensor) -> Tensor:
    """A copy with the same strides, gaps and all."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return torch.full((size,), torch.nan, dtype=x.dtype).as_strided(x.shape, x.stride()).copy_(x)


def check(name: str, *args: Any, **kwargs: Any) -> None:
    """``name`` folded, by the reference, and by the reference in fp64. What is written in place is written in place."""
    place = "out" if "out" in kwargs else "accumulate"

    def run(module: Any, convert: Any) -> Any:
        fresh = {key: convert(like(v)) if isinstance(v, Tensor) else v for key, v in kwargs.items()}
        if fresh.get("dtype") is not None and convert is double:
            fresh["dtype"] = torch.float64
        found = getattr(module, name)(*map(convert, args), **fresh)
        into = fresh.get(place)
        if into is not None and name != "join_backward":  # there its memory may be used
            given = {"conv_forward": lambda: found[0], "join_forward": lambda: found[1], "normalise_forward": lambda: found}
            assert given.get(name, lambda: found[0])() is into
        return tuple(found) if isinstance(found, tuple) else found

    assert kernels.supports(name, args, kwargs) is None
    mine, theirs = run(kernels, lambda v: v), run(reference, lambda v: v)
    for a, b in zip(*(pair if isinstance(pair, tuple) else (pair,) for pair in (mine, theirs)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or a.dim() < 3 or place in kwargs or not a._is_view(), "autograd refuses to write to it"
    # 8 where other tests have 4: results that are summed from a few dozen rounded values are the reference's luck as much as ours.
    assert_as_good(name, mine, theirs, run(reference, double), factor=8.0)


@pytest.mark.parametrize("fold", [image, frames, lines])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folds_keep_every_value_and_copy_only_what_they_must(fold: Any, layout: str) -> None:
    x = values((2, 5, 3, 4, 6), torch.float32, layout)
    y = folded(x, fold)
    assert y.shape == fold(x.shape)
    assert torch.equal(unfolded(y, x.shape), x)
    assert not unfolded(y, x.shape)._is_view()
    if layout in ("last", "slice"):
        assert y.data_ptr() == x.data_ptr()
        assert y.stride(1) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sweeps(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x, dz = values(shape, dtype, layout), values(shape, dtype)
    t = transform_of(x)
    mean, a, b = torch.randn(3, shape[1]).unbind()
    check("statistics_forward", x)
    check("statistics_backward", x, mean, a, b, None)
    check("normalise_forward", x, t, dtype=dtype)
    check("normalise_forward", dz, t, dtype=dtype, out=x)
    check("normalise_backward", dz, x, t)
    check("normalise_backward", dz, x, t, accumulate=values(shape, dtype, layout))
    if len(shape) == 2:
        return  # no spatial positions to take a mean over
    check("squeeze_forward", x, t, dtype=dtype)
    pooled = torch.randn(shape[:2]).to(dtype)
    check("squeeze_backward", pooled, None, x, t)
    check("squeeze_backward", pooled, dz, x, t)
    check("squeeze_backward", pooled, dz, x, t, accumulate=values(shape, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_added_to_in_place_by_position(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """``accumulate`` of statistics_backward, and squeeze_backward's that is ``dz`` itself and is overwritten."""
    x, into = values(shape, dtype), values(shape, dtype, layout)
    t = transform_of(x)
    mean, a, b = torch.randn(3, shape[1]).unbind()
    pooled = torch.randn(shape[:2]).to(dtype)
    cases = [("statistics_backward", (x, mean, a, b, into), 4), ("squeeze_backward", (pooled, into, x, t), 1)]
    for name, args, place in cases[: len(shape) - 1]:
        results = []
        for module, convert in ((kernels, lambda v: v), (reference, lambda v: v), (reference, double)):
            given = [convert(like(v)) if i == place else convert(v) for i, v in enumerate(args)]
            options = {} if place == 4 else {"accumulate": given[1]}
            found = getattr(module, name)(*given, **options)
            assert (found if place == 4 else found[0]) is given[place]
            results.append(found)
        assert_as_good(name, *results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    y, r, dout = values(shape, dtype), values(shape, dtype, layout), values(shape, dtype, layout)
    out = values(shape, dtype)
    statistics = tuple(torch.randn(3, shape[1]).unbind())
    for tr in (Transform(), transform_of(r, "identity")):
        ty = transform_of(y, "identity")
        check("residual_forward", y, ty, r, tr, "silu", dtype=dtype, statistics=True)
        check("residual_backward", dout, statistics, y, ty, r, tr, out, "silu")
        check("residual_backward", dout, None, y, ty, r, tr, out, "identity")


# x, outputs, kernel, stride, padding, dilation, groups
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "1-D": ((2, 5, 11), 7, (3,), (1,), (1,), (1,), 1),
    "1-D strided, dilated, grouped": ((3, 6, 17), 9, (3,), (2,), (2,), (2,), 3),
    "1-D depthwise": ((2, 9, 12), 9, (5,), (1,), (2,), (1,), 9),
    "1-D of one value": ((4, 17, 1), 6, (1,), (1,), (0,), (1,), 1),
    "frames": ((2, 5, 3, 6, 7), 8, (1, 3, 3), (1, 2, 1), (0, 1, 1), (1, 1, 1), 1),
    "frames, one image": ((1, 16, 4, 5, 5), 16, (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1),
    "frames, grouped and dilated": ((2, 6, 2, 7, 6), 4, (1, 3, 2), (1, 1, 1), (0, 2, 0), (1, 2, 1), 2),
    "frames, depthwise": ((2, 13, 3, 5, 6), 13, (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 13),
    "pointwise": ((2, 11, 3, 4, 5), 9, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1),
    "every other frame": ((2, 5, 5, 6, 6), 8, (1, 1, 1), (2, 2, 2), (0, 0, 0), (1, 1, 1), 1),
    "every third frame of six": ((2, 7, 6, 4, 4), 5, (1, 3, 3), (3, 1, 1), (0, 1, 1), (1, 1, 1), 1),
    "lines": ((2, 5, 6, 3, 5), 7, (3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1),
    "lines, strided and dilated": ((1, 18, 9, 4, 4), 12, (3, 1, 1), (2, 1, 1), (2, 0, 0), (2, 1, 1), 1),
    "lines, depthwise": ((2, 10, 7, 3, 3), 10, (5, 1, 1), (1, 1, 1), (2, 0, 0), (1, 1, 1), 10),
    "lines of one frame": ((2, 6, 1, 4, 3), 5, (3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1),
    "volume": ((2, 5, 4, 6, 5), 7, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    "volume, strided": ((1, 16, 5, 7, 7), 20, (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 1),
    "volume, grouped": ((2, 8, 3, 5, 4), 12, (2, 3, 3), (1, 2, 1), (0, 1, 1), (1, 1, 1), 4),
    "volume, depthwise": ((2, 9, 4, 5, 5), 9, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 9),
    "volume, dilated": ((1, 6, 6, 6, 6), 4, (3, 2, 2), (1, 1, 1), (2, 0, 1), (2, 1, 1), 1),
    "a kernel in time and width": ((2, 6, 4, 3, 5), 8, (3, 1, 3), (1, 1, 1), (1, 0, 1), (1, 1, 1), 1),
    "a frame's kernel padded in time": ((2, 6, 3, 4, 4), 8, (1, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
}
GATED = [name for name, case in CONVOLUTIONS.items() if folding_of(case[2], ConvGeometry(*case[3:])) is not None]


def convolution(name: str, dtype: torch.dtype, layout: str = "last") -> tuple[Tensor, Tensor, ConvGeometry, tuple[int, ...]]:
    """(x, weight, geometry, y's shape)."""
    shape, outputs, kernel, *rest = CONVOLUTIONS[name]
    geometry = ConvGeometry(*rest)
    weight = torch.randn(outputs, shape[1] // geometry.groups, *kernel) * 0.3
    return values(shape, dtype, layout), weight, geometry, (shape[0], outputs, *geometry.output_size(shape[2:], kernel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, layout: str, dtype: torch.dtype) -> None:
    x, weight, geometry, shape = convolution(name, dtype, layout)
    bias = torch.randn(shape[1])
    for t in (transform_of(x), Transform()):
        check("conv_forward", x, t, weight, bias, geometry, dtype=dtype, statistics=True)
        check("conv_forward", x, t, weight, None, geometry, dtype=dtype, statistics=True, out=values(shape, dtype, layout))
        dy, y = values(shape, dtype, layout), values(shape, dtype)
        for edge in (edge_of(y), BackwardEdge(), BackwardEdge(torch.rand(shape[1]) + 0.5)):
            check("conv_backward", dy, edge, x, t, weight, geometry, dtype=dtype, needs=(True, True, True))
        into = values(x.shape, dtype, layout)
        check("conv_backward", dy, edge_of(y), x, t, weight, geometry, dtype=dtype, needs=(True, True, False), accumulate=into)
        if layout == "last":
            for needs in ((False, True, True), (True, False, False), (False, False, True)):
                check("conv_backward", dy, edge_of(y), x, t, weight, geometry, dtype=dtype, needs=needs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GATED)
def test_gates(name: str, dtype: torch.dtype) -> None:
    x, weight, geometry, shape = convolution(name, dtype)
    t = transform_of(x, gate=True)
    check("conv_forward", x, t, weight, None, geometry, dtype=dtype, statistics=True)
    dy, y = values(shape, dtype), values(shape, dtype)
    check("conv_backward", dy, edge_of(y), x, t, weight, geometry, dtype=dtype, needs=(True, True, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["slice", "gaps"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_joins(name: str, layout: str, dtype: torch.dtype) -> None:
    x, weight, geometry, shape = convolution(name, dtype)
    weight, bias = weight.to(dtype), torch.randn(shape[1])
    r, z = values(x.shape, dtype, layout), values(x.shape, dtype)
    dy, y = values(shape, dtype, layout), values(shape, dtype)
    for tr in (Transform(), transform_of(r, "identity")):
        join = Join(x, transform_of(x, "identity"), r, tr, "silu")
        check("join_forward", join, weight, bias, geometry, dtype=dtype, statistics=True)
        check("join_forward", join, weight, bias, geometry, dtype=dtype, statistics=True, out=values(shape, dtype, layout))
        args = dy, edge_of(y), z, join, weight, geometry
        check("join_backward", *args, dtype=dtype, needs=(True, True))
        check("join_backward", *args, dtype=dtype, needs=(True, True), accumulate=values(x.shape, dtype, layout))


@pytest.mark.parametrize("name", ["frames", "lines", "volume", "every other frame"])
def test_a_float32_input_under_autocast(name: str) -> None:
    """The video itself, before the first convolution. Where it is normalised first, in float32, none of these kernels is for it."""
    x, weight, geometry, shape = convolution(name, torch.float32)
    dy, t = values(shape, torch.bfloat16), Transform()
    check("conv_forward", x, t, weight, None, geometry, dtype=torch.bfloat16, statistics=True)
    options = {"dtype": torch.bfloat16, "needs": (True, True, False)}
    check("conv_backward", dy, BackwardEdge(), x, t, weight, geometry, **options)
    check("conv_backward", dy, BackwardEdge(), x, t, weight, geometry, **options, accumulate=values(x.shape, torch.float32))
    forward = (x, transform_of(x), weight, None, geometry), {"dtype": torch.bfloat16, "statistics": True}
    backward = (dy, BackwardEdge(), x, transform_of(x), weight, geometry), options
    for kernel, (args, given) in (("conv_forward", forward), ("conv_backward", backward)):
        assert "normalised" in str(kernels.supports(kernel, args, given))


@pytest.mark.parametrize("layout", ["slice", "gaps"])
@pytest.mark.parametrize("name", ["1-D", "frames", "lines", "volume", "every other frame"])
def test_neighbours_in_memory_stay_as_they_are(name: str, layout: str) -> None:
    x, weight, geometry, shape = convolution(name, torch.float32)
    out, into = values(shape, torch.float32, layout), values(x.shape, torch.float32, layout)
    kernels.conv_forward(x, transform_of(x), weight, None, geometry, dtype=x.dtype, statistics=False, out=out)
    dy = values(shape, torch.float32)
    options: dict[str, Any] = {"dtype": x.dtype, "needs": (True, True, False)}
    kernels.conv_backward(dy, edge_of(out), x, transform_of(x), weight, geometry, **options, accumulate=into)
    for t in (out, into):
        size = t.untyped_storage().nbytes() // 4
        assert torch.empty(0).set_(t.untyped_storage(), 0, (size,), (1,)).isnan().sum() == size - t.numel()
        assert not t.isnan().any()


def test_a_small_correction_survives_a_volume_in_bfloat16() -> None:
    """What batch norm subtracts from every value of a gradient, far below its last place, is there in the sums (kernels/rounding.py)."""
    _, weight, geometry, _ = convolution("volume", torch.bfloat16)
    x, y = values((2, 5, 8, 12, 12), torch.bfloat16), values((2, 7, 8, 12, 12), torch.bfloat16)
    dy = laid_out((torch.randn(y.shape) + 1e-3).to(y.dtype), "last")
    mean, _ = reference.statistics_forward(y)
    edge = BackwardEdge(torch.ones(7), torch.zeros(7), -reference.statistics_forward(dy)[0], y, mean)
    args = dy, edge, x, Transform(), weight.abs(), geometry
    found = kernels.conv_backward(*args, dtype=torch.bfloat16, needs=(True, False, False)).dx
    truth = reference.conv_backward(*map(to_double, args), dtype=torch.float64, needs=(True, False, False)).dx
    plain = reference.conv_backward(
        *map(to_double, (args[0], BackwardEdge(), *args[2:])), dtype=torch.float64, needs=(True, False, False)
    ).dx
    lost, error = (truth - plain).sum().abs(), (found.double() - truth).sum().abs()
    assert error < 0.5 * lost, (float(error), float(lost))


@pytest.mark.parametrize("args", [(2, 5, 3, 4, 6), (2, 5, 9), (6, 7)], ids=str)
def test_select_takes_them_where_it_can(args: tuple[int, ...]) -> None:
    x = values(args, torch.float32)
    t = transform_of(x)
    assert registry.select("auto", "normalise_forward", (x, t), {"dtype": x.dtype}).__qualname__.startswith("FoldedKernels")
    assert registry.select("auto", "normalise_forward", (x.double(), t), {"dtype": torch.float64}) is reference.normalise_forward
    pooled = torch.randn(args[:2])
    assert registry.select("auto", "squeeze_backward", (pooled, None, x, t), {}).__qualname__.startswith("FoldedKernels")
    assert registry.select("reference", "statistics_forward", (x,), {}) is reference.statistics_forward
    vectors = tuple(torch.rand(8, 5).unbind())
    assert registry.select("auto", "finalize_forward", vectors, {}).__module__ == "bnrestructure.kernels.cpu.finalize"


def test_what_is_refused_says_why() -> None:
    x, weight, geometry, _ = convolution("volume", torch.float32)
    gated = transform_of(x, gate=True)
    options = {"dtype": torch.float32, "statistics": True}
    reasons = {
        "a gate": kernels.supports("conv_forward", (x, gated, weight, None, geometry), options),
        "float64": kernels.supports("conv_forward", (x, Transform(), weight, None, geometry), {**options, "dtype": torch.float64}),
        "empty": kernels.supports("conv_forward", (x[:0], Transform(), weight, None, geometry), options),
        "4-D": kernels.supports("max_pool_forward", (x, Transform(), PoolGeometry((2,), (2,), (0,), False)), {"dtype": x.dtype}),
    }
    for word, reason in reasons.items():
        assert reason is not None
        assert word in reason
        assert "\n" not in reason
    x, weight, geometry, _ = convolution("frames", torch.float32)
    assert "float64" in str(kernels.supports("conv_forward", (x.double(), Transform(), weight, None, geometry), options))
    join = Join(x, transform_of(x, "identity"), x, Transform(), "tanh")
    assert kernels.supports("join_forward", (join, weight, None, geometry), options) is not None
    assert kernels.supports("join_forward", (replace(join, act="relu"), weight, None, geometry), options) is None


@pytest.mark.parametrize(("name", "forward"), [("lines", "fused"), ("frames, depthwise", "depthwise"), ("volume", "hybrid")])
def test_choices(name: str, forward: str) -> None:
    x, weight, geometry, _ = convolution(name, torch.float32)
    found = kernels.convolution_choices(tuple(x.shape), tuple(weight.shape), transform_of(x), geometry, torch.float32)
    assert found[0].implementation == forward
    refused = kernels.convolution_choices(tuple(x.shape), tuple(weight.shape), Transform(), geometry, torch.float64)
    assert refused[0].implementation == "reference"
    assert "float64" in refused[0].reason
