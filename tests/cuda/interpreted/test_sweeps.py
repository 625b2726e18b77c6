"""Sweeps, statistics and the finalize, interpreted, against the reference in the same precision and in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.cpu_checks import LAYOUTS, assert_as_good, in_layout, to_double
from torch import Tensor

from bnrestructure.core.activation import PLAIN_ACTIVATIONS
from bnrestructure.core.edges import BackwardEdge, Join, Transform
from bnrestructure.kernels.calls import (
    Call,
    FinalizeBackward,
    FinalizeForward,
    JoinBackward,
    JoinForward,
    NormaliseBackward,
    NormaliseForward,
    OutputGradient,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.cuda.merge import merge_statistics
from bnrestructure.kernels.reference import REFERENCE
from bnrestructure.kernels.rounding import gradient_factor
from bnrestructure.kernels.unmerged import Unmerged

ACTIVATIONS = (*PLAIN_ACTIVATIONS, "leaky_relu(0.1)")
#: The last two: channels that are multiples of 8 and of 4 alone, in several tiles.
SHAPES = ((2, 5, 3, 4), (1, 1, 1, 2), (3, 4, 1, 1), (2, 9, 4, 4), (2, 40, 3, 3), (1, 100, 2, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def activation_tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "channels_last") -> Tensor:
    """Values whose channels' means are far from zero beside their deviations."""
    return in_layout((torch.randn(shape) + 3 * torch.randn(1, shape[1], 1, 1)).to(dtype), layout)


def transform_for(x: Tensor, act: str = "identity") -> Transform:
    c = x.shape[1]
    return Transform(x.float().mean((0, 2, 3)), torch.rand(c) + 0.5, torch.randn(c), act)


def check(call: Call[Any], factor: float = 4.0) -> Any:
    """The kernel is as near to fp64 as the reference is. Returns its result."""
    value = KERNELS.run(call)
    assert_as_good(type(call).__name__, value, REFERENCE.run(call), REFERENCE.run(to_double(call)), factor)
    return value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = activation_tensor(shape, dtype)
    mean, _ = check(StatisticsForward(x))
    check(StatisticsBackward(x, mean, torch.randn(shape[1]), torch.randn(shape[1])))
    check(StatisticsBackward(x, mean, torch.randn(shape[1]), torch.randn(shape[1]), None, 3))


@pytest.mark.parametrize("layout", ["slice", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_copy_on_the_way(layout: str, dtype: torch.dtype) -> None:
    x = activation_tensor((3, 9, 5, 4), dtype)
    buffer = torch.zeros(3, 20, 5, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    out = buffer[:, 8:17] if layout == "slice" else torch.zeros(x.shape, dtype=dtype)
    check(StatisticsForward(x))
    found = KERNELS.run(StatisticsForward(x, out))
    assert all(torch.equal(one, other) for one, other in zip(found, KERNELS.run(StatisticsForward(x)), strict=True))
    assert torch.equal(out, x)
    assert not buffer[:, :8].any()
    assert not buffer[:, 17:].any()


def test_statistics_far_from_zero() -> None:
    """A mean 10^4 deviations away: sums of squares would leave nothing of the variance."""
    x = (torch.randn(4, 3, 8, 9) + 1e4).contiguous(memory_format=torch.channels_last)
    check(StatisticsForward(x))


@pytest.mark.own_tiles
def test_statistics_merge_of_many_tiles() -> None:
    """More tiles than are merged at a time (128), the last one nearly empty."""
    x = torch.randn(1, 64, 8193, 1).contiguous(memory_format=torch.channels_last) + 5
    check(StatisticsForward(x))


@pytest.mark.own_tiles
@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("count", [1, 128, 129, 512, 513, 2048, 2049, 5000])
def test_merge(count: int, counted: bool, far: float) -> None:
    """One launch, or several, of one turn or several, against float64; the last tile has fewer rows."""
    channels, unit, last = 11, 3, 2
    rows = torch.full((count,), float(unit))
    rows[-1] = last
    means = torch.randn(count, channels, dtype=torch.float64) + far + torch.linspace(0, 3, count, dtype=torch.float64)[:, None]
    m2 = torch.rand(count, channels, dtype=torch.float64)
    rounded = means.float()
    partial = torch.stack((rounded, (means - rounded.double()).float(), m2.float()))
    given = {"counts": rows} if counted else {"rows": unit * (count - 1) + last, "unit": unit}
    mean, var = merge_statistics(Unmerged(partial, **given))
    weights = rows.double()[:, None] / rows.double().sum()
    exact = (weights * means).sum(0)
    spread = (weights * (means - exact).square()).sum(0) + m2.sum(0) / rows.double().sum()
    assert torch.allclose(mean.double(), exact, rtol=1e-7, atol=5e-6)  # the deviation is 1.3; the interpreter adds a turn's in a row
    assert torch.allclose(var.double(), spread, rtol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_normalise(act: str) -> None:
    x = activation_tensor((2, 5, 3, 4), torch.float32)
    check(NormaliseForward(x, transform_for(x, act), dtype=torch.float32))
    check(NormaliseBackward(torch.randn(x.shape), x, transform_for(x, act)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalise_layouts_and_types(layout: str, dtype: torch.dtype) -> None:
    x = activation_tensor((2, 5, 3, 4), dtype, layout)
    t = transform_for(x, "relu")
    check(NormaliseForward(x, t, dtype=dtype))
    check(NormaliseBackward(activation_tensor((2, 5, 3, 4), dtype, layout), x, t))


def test_normalise_gate_and_plain_activation() -> None:
    x = activation_tensor((2, 5, 3, 4), torch.float32)
    t = transform_for(x, "silu")
    check(NormaliseForward(x, Transform(t.mean, t.scale, t.beta, "silu", torch.rand(2, 5)), dtype=torch.float32))
    check(NormaliseForward(x, Transform(act="relu"), dtype=torch.float32))
    check(NormaliseBackward(torch.randn(x.shape), x, Transform(act="relu")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 11, 13)], ids=str)
def test_normalise_with_a_gate_and_a_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Images of more and of fewer pixels than a tile; what is added in another layout; the gradient at what the gate multiplies."""
    x, r = activation_tensor(shape, dtype), activation_tensor(shape, dtype, "contiguous")
    t = transform_for(x, "silu")
    gated = t._replace(gate=torch.rand(shape[:2]) + 0.2)
    check(NormaliseForward(x, gated, dtype))
    check(NormaliseForward(x, gated, dtype, r=r))
    check(NormaliseForward(x, t, dtype, r=x))
    check(NormaliseForward(x, Transform(act="relu"), dtype, r=r))
    dz = torch.randn(shape).to(dtype)
    check(NormaliseBackward(dz, x, gated, factor=0.7))
    check(NormaliseBackward(dz, x, t, factor=0.7, factors=gated.gate))
    check(NormaliseBackward(dz, x, Transform(act="hardswish", gate=gated.gate)))
    own = activation_tensor(shape, dtype)
    value, truth = (
        kernels.run(NormaliseBackward(as_(dz), as_(x), to(gated), as_(own)))
        for kernels, as_, to in ((KERNELS, torch.clone, lambda v: v), (REFERENCE, torch.Tensor.double, to_double))
    )
    torch.testing.assert_close(value.dx.double(), truth.dx, rtol=torch.finfo(dtype).eps * 2, atol=torch.finfo(dtype).eps * 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalise_into(layout: str) -> None:
    """``out`` is written to and returned, whatever its strides."""
    x = activation_tensor((2, 5, 3, 4), torch.float32)
    out = in_layout(torch.full(x.shape, torch.nan), layout)
    t = transform_for(x, "relu")
    assert KERNELS.run(NormaliseForward(x, t, dtype=torch.float32, out=out)) is out
    torch.testing.assert_close(out, REFERENCE.run(NormaliseForward(x, t, dtype=torch.float32)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_is_in_place(layout: str, dtype: torch.dtype) -> None:
    x = activation_tensor((2, 5, 3, 4), dtype)
    t, before = transform_for(x, "relu"), torch.randn(x.shape).to(dtype)
    vectors = (t.mean, torch.randn(5), torch.randn(5))
    dz = torch.randn(x.shape).to(dtype)
    for name, args in (("normalise_backward", (dz, x, t)), ("statistics_backward", (x, *vectors))):
        own, theirs = in_layout(before, layout), before.double()
        if name == "normalise_backward":
            value = KERNELS.run(NormaliseBackward(*args, accumulate=own))[0]
            truth = REFERENCE.run(NormaliseBackward(*map(to_double, args), accumulate=theirs))[0]
        else:
            value = KERNELS.run(StatisticsBackward(*args, own))
            truth = REFERENCE.run(StatisticsBackward(*map(to_double, args), theirs))
        assert value is own
        torch.testing.assert_close(
            value.double(), truth, rtol=torch.finfo(dtype).eps * 2, atol=torch.finfo(dtype).eps * 4
        )


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("normalised", [False, True])
def test_residual(act: str, normalised: bool) -> None:
    check_residual((2, 5, 3, 4), act, normalised, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_shapes_and_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_residual(shape, "relu", True, dtype)


def check_residual(shape: tuple[int, ...], act: str, normalised: bool, dtype: torch.dtype) -> None:
    y, r = activation_tensor(shape, dtype), activation_tensor(shape, dtype)
    ty, tr = transform_for(y), transform_for(r) if normalised else Transform()
    join = Join(y, ty, r, tr, act)
    out, mean, _ = check(JoinForward(join, dtype, True))
    assert check(JoinForward(join, dtype))[1] is None
    dout, c = torch.randn(shape).to(dtype), shape[1]
    check(JoinBackward(dout, None, join, out))
    check(JoinBackward(dout, (torch.randn(c), torch.randn(c), mean), join, out))
    check(JoinBackward(dout, None, join, out, 1.4, torch.randn(shape).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_gradient(dtype: torch.dtype) -> None:
    shape = (2, 9, 4, 4)
    p, y = activation_tensor(shape, dtype), activation_tensor(shape, dtype)
    s, a, b = torch.randn(3, 9).unbind()
    full = BackwardEdge(s, a, b, y, y.float().mean((0, 2, 3)))
    for edge in (full, BackwardEdge(s)):
        check(OutputGradient(p, edge, dtype, gradient_factor(edge.a is not None, dtype, torch.float32), True), factor=8.0)


def test_nan_stays_nan() -> None:
    """An activation must not turn a diverged value into a number."""
    x = torch.full((1, 1, 1, 4), torch.nan)
    for act in ACTIVATIONS:
        t = Transform(torch.zeros(1), torch.ones(1), torch.zeros(1), act)
        assert KERNELS.run(NormaliseForward(x, t, dtype=torch.float32)).isnan().all(), act
        gradient, *_ = KERNELS.run(NormaliseBackward(torch.ones_like(x), x, t))
        expected, *_ = REFERENCE.run(NormaliseBackward(torch.ones_like(x), x, t))
        assert torch.equal(gradient.isnan(), expected.isnan()), act


def test_kinks_are_torchs() -> None:
    """Value and derivative exactly at, and far beyond, every kink."""
    x = torch.tensor([-1e10, -1e4, -6, -3, -1, -0.0, 0.0, 1, 3, 6, 1e4, 1e10]).view(1, 1, 1, -1)
    for act in ACTIVATIONS:
        t = Transform(torch.zeros(1), torch.ones(1), torch.zeros(1), act)
        torch.testing.assert_close(
            KERNELS.run(NormaliseForward(x, t, dtype=torch.float32)), REFERENCE.run(NormaliseForward(x, t, dtype=torch.float32))
        )
        gradients = [k.run(NormaliseBackward(torch.ones_like(x), x, t)).dx for k in (KERNELS, REFERENCE)]
        torch.testing.assert_close(*gradients, msg=lambda text, act=act: f"{act}: {text}")


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_far_out_derivatives_are_numbers(act: str) -> None:
    """Where PyTorch's own gelu_backward(tanh) multiplies an infinity by zero."""
    x = torch.tensor([-1e30, 1e30]).view(1, 1, 1, 2)
    gradient, *_ = KERNELS.run(NormaliseBackward(torch.ones_like(x), x, Transform(act=act)))
    left = {"identity": 1.0, "leaky_relu(0.1)": 0.1}.get(act, 0.0)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([left, 0.0 if act == "relu6" else 1.0]))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finalize(affine: bool, dtype: torch.dtype) -> None:
    c = 300  # more than a block
    mean, var = torch.randn(c), torch.rand(c) + 0.1
    parameters = (torch.randn(c).to(dtype), torch.randn(c).to(dtype)) if affine else (None, None)
    for count in (2, 1000, torch.tensor([1000])):
        ours, theirs = (torch.randn(c).to(dtype), torch.rand(c).to(dtype)), None
        theirs = tuple(r.clone() for r in ours)
        value = KERNELS.run(FinalizeForward(mean, var, count, *parameters, *ours, 0.1, 1e-5))
        expected = REFERENCE.run(FinalizeForward(mean, var, count, *parameters, *theirs, 0.1, 1e-5))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(ours, theirs)
    check(FinalizeBackward(torch.randn(c), torch.randn(c), *value[:2]))


@pytest.mark.parametrize("first", [1, 256, 299])
def test_finalize_of_a_concat_that_is_handed_on(first: int) -> None:
    c = 300
    mean, var = torch.randn(c), torch.rand(c) + 0.1
    parameters = torch.randn(c), torch.randn(c)
    ours = torch.randn(c), torch.rand(c)
    theirs = tuple(r.clone() for r in ours)
    call = FinalizeForward(mean[:first], var[:first], 8, *parameters, *ours, 0.1, 1e-5, None, (mean[first:], var[first:]))
    whole = REFERENCE.run(FinalizeForward(mean, var, 8, *parameters, *theirs, 0.1, 1e-5))
    found = KERNELS.run(call)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(found.mean, mean)
    assert torch.equal(found.var, var)
    for others in ((torch.randn(c), torch.randn(c)), (torch.randn(c), None), (None, torch.randn(c))):
        check(FinalizeBackward(torch.randn(c), torch.randn(c), whole.rstd, whole.scale, *others))


@pytest.mark.parametrize("known", [0, 3, 40])
@pytest.mark.parametrize("rows", [5, 70, 1100])
@pytest.mark.parametrize("counted", [False, True])
def test_finalize_merges_what_tiles_have_found(known: int, rows: int, counted: bool) -> None:
    """As after a merge of its own; channels that are known already may lie before, in the same block and in another."""
    c = 37
    x = (torch.randn(1, c, rows, 1) + 10 * torch.randn(c)[:, None, None]).contiguous(memory_format=torch.channels_last)
    left, none = KERNELS.run(StatisticsForward(x, unmerged=True))
    assert isinstance(left, Unmerged)
    assert none is None
    if counted:
        covered = left.rows - left.unit * torch.arange(left.partial.shape[1])
        left = Unmerged(left.partial, counts=covered.clamp(max=left.unit).float())
    found = KERNELS.run(StatisticsForward(x))
    mean, var = (torch.cat([torch.rand(known), v]) for v in found)
    weight, bias, running = torch.randn(known + c), torch.randn(known + c), torch.zeros(known + c)
    expected = KERNELS.run(FinalizeForward(mean, var, rows, weight, bias, running.clone(), None, 1.0, 1e-5))
    for kernels in (KERNELS, REFERENCE):
        room = torch.full((c,), torch.nan), torch.full((c,), torch.nan)
        parts = (room, None) if not known else ((mean[:known], var[:known]), room)
        ours = running.clone()
        value = kernels.run(FinalizeForward(*parts[0], rows, weight, bias, ours, None, 1.0, 1e-5, None, parts[1], left))
        torch.testing.assert_close(room, found)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(ours, mean)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_finalize_counts_the_batch(momentum: float | None, dtype: torch.dtype) -> None:
    c = 600  # three programs
    mean, var = torch.randn(c), torch.rand(c) + 0.1
    ours = torch.randn(c), torch.rand(c), torch.tensor(6, dtype=dtype)
    theirs = tuple(r.clone() for r in ours)
    for running_mean, running_var, batches in (ours, theirs):
        kernels = KERNELS if batches is ours[2] else REFERENCE
        kernels.run(FinalizeForward(mean, var, 8, None, None, running_mean, running_var, momentum, 1e-5, batches))
        assert batches == 7
    torch.testing.assert_close(ours, theirs)


def test_finalize_without_running_statistics() -> None:
    mean, var = torch.randn(3), torch.rand(3)
    value = KERNELS.run(FinalizeForward(mean, var, 8, None, None, None, None, 0.1, 1e-5))
    torch.testing.assert_close(value, REFERENCE.run(FinalizeForward(mean, var, 8, None, None, None, None, 0.1, 1e-5)))
