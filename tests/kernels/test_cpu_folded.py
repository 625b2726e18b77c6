"""1-D and 3-D activations on the CPU kernels (kernels/folded) against the reference kernels in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_checks import assert_as_good, fresh, like, to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.aliases import channels_last_buffer
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, PoolGeometry, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import (
    Call,
    ConvBackward,
    ConvForward,
    FinalizeForward,
    JoinBackward,
    JoinForward,
    MaxPoolForward,
    NormaliseBackward,
    NormaliseForward,
    OutputGradient,
    SqueezeBackward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.cpu import KERNELS
from bnrestructure.kernels.folded import FoldedKernels
from bnrestructure.kernels.folded.geometry import folding_of
from bnrestructure.kernels.folded.views import folded, frames, image, lines, unfolded
from bnrestructure.kernels.reference import REFERENCE, ReferenceKernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]

kernels = FoldedKernels(KERNELS)
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
    mean, var = REFERENCE.run(StatisticsForward(x))
    c = x.shape[1]
    vectors = mean, torch.rand(c) / (var + 1e-2).sqrt() + 0.1, torch.randn(c)
    return Transform(*vectors, act, torch.rand(x.shape[0], c) + 0.5 if gate else None)


def edge_of(y: Tensor) -> BackwardEdge:
    mean, _ = REFERENCE.run(StatisticsForward(y))
    c = y.shape[1]
    return BackwardEdge(torch.rand(c) + 0.5, torch.randn(c) * 0.1, torch.randn(c) * 0.1, y, mean)


def check(call: Call[Any]) -> None:
    """The call folded, by the reference, and by the reference in fp64. What is written in place is written in place."""

    def run(by: Any, of: Any) -> Any:
        given = fresh(of)
        found = by.run(given)
        into = getattr(given, "accumulate", getattr(given, "out", None))
        if into is not None and getattr(given, "join", None) is None:  # behind a join its memory may be used
            assert (found if isinstance(found, Tensor) else found[0]) is into
        if isinstance(given, ConvForward) and given.join is not None:
            return given.x.clone(), *found
        return tuple(found) if isinstance(found, tuple) else found

    assert kernels.supports(call) is None
    mine, theirs = run(kernels, call), run(REFERENCE, call)
    in_place = getattr(call, "out", None) is not None or getattr(call, "accumulate", None) is not None
    for a, b in zip(*(pair if isinstance(pair, tuple) else (pair,) for pair in (mine, theirs)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or a.dim() < 3 or in_place or not a._is_view(), "autograd refuses to write to it"
    # 8 where other tests have 4: results that are summed from a few dozen rounded values are the reference's luck as much as ours.
    assert_as_good(type(call).__name__, mine, theirs, run(REFERENCE, to_double(call)), factor=8.0)


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
    check(StatisticsForward(x))
    check(StatisticsBackward(x, mean, a, b))
    check(StatisticsBackward(x, mean, a, b, values(shape, dtype, layout)))
    check(OutputGradient(dz, BackwardEdge(a, b, mean, x, mean), dtype, 0.7, True))
    check(NormaliseForward(x, t, dtype=dtype))
    check(NormaliseForward(x, t, dtype=dtype, r=values(shape, dtype, layout)))
    check(NormaliseForward(dz, t, dtype=dtype, out=x))
    check(NormaliseBackward(dz, x, t))
    check(NormaliseBackward(dz, x, t, factors=torch.rand(shape[:2])))
    check(NormaliseBackward(dz, x, t, accumulate=values(shape, dtype, layout)))
    if len(shape) == 2:
        return  # no spatial positions to take a mean over
    check(SqueezeForward(x, t, dtype=dtype))
    pooled = torch.randn(shape[:2]).to(dtype)
    check(SqueezeBackward(pooled, None, x, t))
    check(SqueezeBackward(pooled, dz, x, t))
    check(SqueezeBackward(pooled, dz, x, t, accumulate=values(shape, dtype, layout)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_overwritten_by_its_identity(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """SqueezeBackward's ``accumulate`` that is ``dz`` itself."""
    x, into = values(shape, dtype), values(shape, dtype, layout)
    if len(shape) == 2:
        return
    pooled, t, results = torch.randn(shape[:2]).to(dtype), transform_of(x), []
    for by, convert in ((kernels, lambda v: v), (REFERENCE, lambda v: v), (REFERENCE, to_double)):
        given = convert(like(into))
        found = by.run(SqueezeBackward(*map(convert, (pooled,)), given, convert(x), convert(t), given))
        assert found.dx is given
        results.append(tuple(found))
    assert_as_good("squeeze", *results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    y, r, dout = values(shape, dtype), values(shape, dtype, layout), values(shape, dtype, layout)
    out = values(shape, dtype)
    statistics = tuple(torch.randn(3, shape[1]).unbind())
    for tr in (Transform(), transform_of(r, "identity")):
        ty = transform_of(y, "identity")
        join = Join(y, ty, r, tr, "silu")
        check(JoinForward(join, dtype, True))
        check(JoinForward(join, dtype, out=values(shape, dtype)))
        check(JoinBackward(dout, statistics, join, out))
        check(JoinBackward(dout, None, replace(join, act="identity"), out))
        gated = replace(join, ty=ty._replace(gate=torch.rand(shape[:2])))
        check(JoinForward(gated, dtype, True))
        check(JoinBackward(dout, statistics, gated, out))


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
        check(ConvForward(x, t, weight, bias, geometry, dtype=dtype, statistics=True))
        check(ConvForward(x, t, weight, None, geometry, dtype=dtype, statistics=True, out=values(shape, dtype, layout)))
        dy, y = values(shape, dtype, layout), values(shape, dtype)
        for edge in (edge_of(y), BackwardEdge(), BackwardEdge(torch.rand(shape[1]) + 0.5)):
            check(ConvBackward(dy, edge, x, t, weight, geometry, dtype=dtype, needs=(True, True, True)))
        into = values(x.shape, dtype, layout)
        check(ConvBackward(dy, edge_of(y), x, t, weight, geometry, dtype=dtype, needs=(True, True, False), accumulate=into))
        if layout == "last":
            for needs in ((False, True, True), (True, False, False), (False, False, True)):
                check(ConvBackward(dy, edge_of(y), x, t, weight, geometry, dtype=dtype, needs=needs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GATED)
def test_gates(name: str, dtype: torch.dtype) -> None:
    x, weight, geometry, shape = convolution(name, dtype)
    t = transform_of(x, gate=True)
    check(ConvForward(x, t, weight, None, geometry, dtype=dtype, statistics=True))
    dy, y = values(shape, dtype), values(shape, dtype)
    check(ConvBackward(dy, edge_of(y), x, t, weight, geometry, dtype=dtype, needs=(True, True, False)))


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
        check(ConvForward(z, Transform(), weight, bias, geometry, dtype, True, join=join))
        check(ConvForward(z, Transform(), weight, bias, geometry, dtype, True, values(shape, dtype, layout), join))
        args = dy, edge_of(y), z, Transform(), weight, geometry, dtype, (True, True, True)
        check(ConvBackward(*args, join=join))
        check(ConvBackward(*args, values(x.shape, dtype, layout), join))


@pytest.mark.parametrize("name", ["frames", "lines", "volume", "every other frame"])
def test_a_float32_input_under_autocast(name: str) -> None:
    """The video itself, before the first convolution. Where it is normalised first, in float32, none of these kernels is for it."""
    x, weight, geometry, shape = convolution(name, torch.float32)
    dy, t = values(shape, torch.bfloat16), Transform()
    check(ConvForward(x, t, weight, None, geometry, dtype=torch.bfloat16, statistics=True))
    options = {"dtype": torch.bfloat16, "needs": (True, True, False)}
    check(ConvBackward(dy, BackwardEdge(), x, t, weight, geometry, **options))
    check(ConvBackward(dy, BackwardEdge(), x, t, weight, geometry, **options, accumulate=values(x.shape, torch.float32)))
    forward = ConvForward(x, transform_of(x), weight, None, geometry, torch.bfloat16, True)
    backward = ConvBackward(dy, BackwardEdge(), x, transform_of(x), weight, geometry, **options)
    for call in (forward, backward):
        assert "normalised" in str(kernels.supports(call))


@pytest.mark.parametrize("layout", ["slice", "gaps"])
@pytest.mark.parametrize("name", ["1-D", "frames", "lines", "volume", "every other frame"])
def test_neighbours_in_memory_stay_as_they_are(name: str, layout: str) -> None:
    x, weight, geometry, shape = convolution(name, torch.float32)
    out, into = values(shape, torch.float32, layout), values(x.shape, torch.float32, layout)
    kernels.run(ConvForward(x, transform_of(x), weight, None, geometry, dtype=x.dtype, statistics=False, out=out))
    dy = values(shape, torch.float32)
    options: dict[str, Any] = {"dtype": x.dtype, "needs": (True, True, False)}
    kernels.run(ConvBackward(dy, edge_of(out), x, transform_of(x), weight, geometry, **options, accumulate=into))
    for t in (out, into):
        size = t.untyped_storage().nbytes() // 4
        assert torch.empty(0).set_(t.untyped_storage(), 0, (size,), (1,)).isnan().sum() == size - t.numel()
        assert not t.isnan().any()


def test_a_small_correction_survives_a_volume_in_bfloat16() -> None:
    """What batch norm subtracts from every value of a gradient, far below its last place, is there in the sums (kernels/rounding.py)."""
    _, weight, geometry, _ = convolution("volume", torch.bfloat16)
    x, y = values((2, 5, 8, 12, 12), torch.bfloat16), values((2, 7, 8, 12, 12), torch.bfloat16)
    dy = laid_out((torch.randn(y.shape) + 1e-3).to(y.dtype), "last")
    mean, _ = REFERENCE.run(StatisticsForward(y))
    edge = BackwardEdge(torch.ones(7), torch.zeros(7), -REFERENCE.run(StatisticsForward(dy)).mean, y, mean)
    call = ConvBackward(dy, edge, x, Transform(), weight.abs(), geometry, torch.bfloat16, (True, False, False))
    found = kernels.run(call).dx
    truth = REFERENCE.run(to_double(call)).dx
    plain = REFERENCE.run(to_double(replace(call, edge=BackwardEdge()))).dx
    lost, error = (truth - plain).sum().abs(), (found.double() - truth).sum().abs()
    assert error < 0.5 * lost, (float(error), float(lost))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4, 6), (2, 5, 9), (6, 7)], ids=str)
def test_what_they_can_answer_is_asked_of_them(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for kind in (FoldedKernels, ReferenceKernels):
        run = kind.run
        monkeypatch.setattr(kind, "run", lambda self, call, run=run, kind=kind: (asked.append(kind.__name__), run(self, call))[1])
    x = values(shape, torch.float32)
    t, vector = transform_of(x), torch.rand(5)
    asked.clear()
    calls = {
        "FoldedKernels": NormaliseForward(x, t, x.dtype),
        "ReferenceKernels": NormaliseForward(x.double(), to_double(t), torch.float64),
        "": FinalizeForward(vector, vector, 3, None, None, None, None, 0.1, 1e-5),
    }
    for last, call in calls.items():
        registry.run("auto", call)
        assert (asked or [""])[-1] == last
        asked.clear()
    registry.run("reference", StatisticsForward(x))
    assert asked == ["ReferenceKernels"]


def test_what_is_refused_says_why() -> None:
    x, weight, geometry, _ = convolution("volume", torch.float32)
    call = ConvForward(x, Transform(), weight, None, geometry, torch.float32, True)
    refused: dict[str, Call[Any]] = {
        "a gate": replace(call, transform=transform_of(x, gate=True)),
        "float64": replace(call, dtype=torch.float64),
        "empty": replace(call, x=x[:0]),
        "4-D": MaxPoolForward(x, Transform(), PoolGeometry((2,), (2,), (0,), False), x.dtype),
    }
    for word, wrong in refused.items():
        reason = kernels.supports(wrong)
        assert reason is not None
        assert word in reason
        assert "\n" not in reason
        with pytest.raises(UnsupportedCallError):
            kernels.run(wrong)
    x, weight, geometry, _ = convolution("frames", torch.float32)
    call = ConvForward(x, Transform(), weight, None, geometry, torch.float32, True)
    assert "float64" in str(kernels.supports(replace(call, x=x.double())))
    join = Join(x, transform_of(x, "identity"), x, Transform(), "tanh")
    assert kernels.supports(replace(call, join=join)) is not None
    assert kernels.supports(replace(call, join=replace(join, act="relu"))) is None


@pytest.mark.parametrize(("name", "forward"), [("lines", "fused"), ("frames, depthwise", "depthwise"), ("volume", "hybrid")])
def test_choices(name: str, forward: str) -> None:
    x, weight, geometry, _ = convolution(name, torch.float32)
    call = ConvForward(x.to("meta"), transform_of(x), weight.to("meta"), None, geometry, torch.float32)
    assert kernels.convolution_choices(call)[0].implementation == forward
    refused = kernels.convolution_choices(replace(call, transform=Transform(), dtype=torch.float64))
    assert refused[0].implementation == "reference"
    assert "float64" in refused[0].reason
