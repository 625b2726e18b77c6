"""The formulas of the CUDA kernels' sweeps, for all values: the kernels themselves run on expressions, over tiles with ragged ends.

Whole kernels run, with their masks and offsets; the shapes are small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sympy as sp
from algebra import NotProved
from prove import edited
from triton_blocks import Block, Memory, launch

pytest.importorskip("triton", reason="triton is not installed")

from bnrestructure.kernels.cuda import edges, merge, residual, statistics, sums

#: Rows, channels, and a tile's: neither is a multiple of the tile's.
ROWS, CHANNELS, BR, BC = 5, 3, 2, 2
TILES, CHANNEL_TILES = -(-ROWS // BR), -(-CHANNELS // BC)
GRID = (TILES * CHANNEL_TILES,)
#: Of the rows, which are two images' pixels, the second one's cut off: the image of each.
POSITIONS, IMAGES = 3, 2
IMAGE_OF_ROW = [row // POSITIONS for row in range(ROWS)]


def unknowns(name: str, *shape: int) -> Any:
    return np.array(sp.symbols([f"{name}{i}" for i in range(int(np.prod(shape)))]), dtype=object).reshape(shape)


def pitched(values: Any, pitch: int) -> Any:
    """[rows, channels] in memory with room behind each row, which nobody may read."""
    return Memory([e for row in values for e in (*row, *[None] * (pitch - len(row)))])


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(np.ravel(found), np.ravel(expected), strict=True):
        rest = sp.expand(one - other)
        if rest != 0 and sp.expand(sp.together(rest).as_numer_denom()[0]) != 0:
            raise NotProved(f"{one} is not {other}")


def moments(x: Any) -> tuple[Any, Any]:
    """Mean and biased variance over the rows."""
    mean = x.sum(0) / sp.Integer(len(x))
    return mean, ((x - mean) ** 2).sum(0) / sp.Integer(len(x))


def test_statistics_of_tiles() -> None:
    """Each tile's mean and M2, and what they merge to, in two rounds of one turn and of two: the statistics of all rows."""
    x = unknowns("x", ROWS, CHANNELS)
    partial, copy = Memory(3 * TILES * CHANNELS), Memory(ROWS * (CHANNELS + 1))
    launch(
        statistics._statistics_kernel, GRID, pitched(x, CHANNELS + 2), copy, partial, CHANNELS + 2, CHANNELS + 1, ROWS, TILES, CHANNELS,
        WIDE=False, UNIT=1, BR=BR, BC=BC,
    )  # fmt: skip
    assert copy.values == pitched(x, CHANNELS + 1).values
    means, remainders, m2 = partial.array(3, TILES, CHANNELS)
    for tile in range(TILES):
        rows = x[tile * BR : (tile + 1) * BR]
        mean, var = moments(rows)
        assert_equal(means[tile] + remainders[tile], mean)
        assert_equal(m2[tile], var * len(rows))
    groups = -(-TILES // 2)
    between, out = Memory(3 * groups * CHANNELS), Memory(2 * CHANNELS)
    sizes: dict[str, Any] = {"BT": 2, "BC": BC}
    launch(
        merge._merge_kernel, (groups, CHANNEL_TILES), partial, None, between, None, TILES, CHANNELS, ROWS, BR, 2, groups,
        FINAL=False, **sizes,
    )  # fmt: skip
    sizes["BT"] = 1
    launch(
        merge._merge_kernel, (1, CHANNEL_TILES), between, None, out, None, groups, CHANNELS, ROWS, 2 * BR, groups, 1, FINAL=True, **sizes
    )  # fmt: skip
    assert_equal(out.array(-1), np.concatenate(moments(x)))


@pytest.mark.parametrize("at_once", [4, 2, 1])
def test_merging_of_counted_tiles(at_once: int) -> None:
    """Tiles of any numbers of rows: the formula of Chan, with the counts unknown; all at once, or some in each turn."""
    tiles = 3
    counts = np.array(sp.symbols("n0:3", positive=True), dtype=object)
    means, m2 = unknowns("mean", tiles, 1), unknowns("m2_", tiles, 1)
    partial, out = Memory([*means.ravel(), *[sp.Integer(0)] * tiles, *m2.ravel()]), Memory(2)
    launch(merge._merge_kernel, (1, 1), partial, Memory(list(counts)), out, None, tiles, 1, 0, 1, tiles, 1, FINAL=True, BT=at_once, BC=2)
    mean = (counts * means[:, 0]).sum() / counts.sum()
    var = (m2[:, 0].sum() + (counts * (means[:, 0] - mean) ** 2).sum()) / counts.sum()
    assert_equal(out.array(-1), [mean, var])


def test_sums_of_two_tensors() -> None:
    """Sums over the middle, of two tensors by one launch, in several turns and with ragged ends."""
    first, second = unknowns("first", 2, 3, 5), unknowns("second", 1, 4, 3)
    out, other = Memory(2 * 5), Memory(3)
    programs = 2 * -(-5 // 2)
    launch(
        sums._sums_kernel, (programs + 1,), Memory(list(first.ravel())), out, Memory(list(second.ravel())), other, programs, 3, 5, 4, 3,
        A_FACTOR=2.0, A_BT=2, A_BC=2, B_FACTOR=1.0, B_BT=4, B_BC=4,
    )  # fmt: skip
    assert_equal(out.array(-1), 2 * first.sum(1))
    assert_equal(other.array(-1), second.sum(1))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_statistics_backward(accumulate: bool, divided: bool) -> None:
    x, before = unknowns("x", ROWS, CHANNELS), unknowns("before", ROWS, CHANNELS)
    mean, a, b = (unknowns(name, CHANNELS) for name in ("mean", "a", "b"))
    dx, rate = Memory(list(before.ravel())) if accumulate else Memory(ROWS * CHANNELS), sp.Symbol("rate") if divided else None
    launch(
        statistics._statistics_backward_kernel, GRID, pitched(x, CHANNELS + 1), *(Memory(list(v)) for v in (mean, a, b)), rate, dx,
        CHANNELS + 1, CHANNELS, ROWS, CHANNELS, ACCUMULATE=accumulate, WIDE=False, UNIT=1, BR=BR, BC=BC,
    )  # fmt: skip
    a, b = (2 * rate * a, rate * b) if divided else (a, b)
    assert_equal(dx.array(-1), a * (x - mean) + b + (before if accumulate else 0))


@pytest.mark.parametrize("counted", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("cumulative", [False, True], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("first", [CHANNELS, CHANNELS - 1], ids=["whole", "in parts"])
def test_finalize(counted: bool, cumulative: bool, first: int) -> None:
    vectors = mean, var, gamma, beta, old_mean, old_var = [
        unknowns(n, CHANNELS) for n in ("mean", "var", "gamma", "beta", "rm", "rv")
    ]
    m, eps, count = sp.symbols("m eps M", positive=True)
    memories = [Memory(list(v)) for v in vectors]
    in_parts = first < CHANNELS
    before = [Memory(list(v[:first])) for v in (mean, var)]
    behind = [Memory(list(v[first:])) if in_parts else None for v in (mean, var)]
    out, batches = Memory(3 * CHANNELS), Memory([sp.Symbol("batches", positive=True)])
    whole = Memory(2 * CHANNELS) if in_parts else None
    launch(
        statistics._finalize_kernel, (1,), *before, *behind, whole, None, None, Memory([count]) if counted else None, *memories[2:],
        batches, out, first, CHANNELS, 0, 0, 0, count / (count - 1), m, eps, CUMULATIVE=cumulative, BT=1, BLOCK=4,
    )  # fmt: skip
    b = sp.Symbol("batches", positive=True)
    assert_equal(batches.array(-1), [b if cumulative else b + 1])
    m = 1 / b if cumulative else m
    root = np.array([1 / sp.sqrt(v + eps) for v in var], dtype=object)
    assert_equal(out.array(-1), np.concatenate([root, gamma * root, beta]))
    if whole is not None:
        assert_equal(whole.array(-1), np.concatenate([mean, var]))
    assert_equal(memories[4].array(-1), (1 - m) * old_mean + m * mean)
    assert_equal(memories[5].array(-1), (1 - m) * old_var + m * var * count / (count - 1))


@pytest.mark.parametrize("known", [0, 1])
def test_finalize_merges_tiles(known: int) -> None:
    """The statistics of all rows, of which tiles have found their own; what was known before them is left as it is."""
    x, gamma, beta = unknowns("x", ROWS, CHANNELS), unknowns("gamma", known + CHANNELS), unknowns("beta", known + CHANNELS)
    known_mean, known_var = unknowns("mean", known), unknowns("var", known)
    partial = Memory(3 * TILES * CHANNELS)
    launch(
        statistics._statistics_kernel, GRID, pitched(x, CHANNELS + 2), None, partial, CHANNELS + 2, 0, ROWS, TILES, CHANNELS,
        WIDE=False, UNIT=1, BR=BR, BC=BC,
    )  # fmt: skip
    eps = sp.Symbol("eps", positive=True)
    room, out, blocks = (Memory(CHANNELS), Memory(CHANNELS)), Memory(3 * (known + CHANNELS)), -(-(known + CHANNELS) // BC)
    launch(
        statistics._finalize_kernel, (blocks,), Memory(list(known_mean)), Memory(list(known_var)), *room, None, partial, None, None,
        Memory(list(gamma)), Memory(list(beta)), None, None, None, out, known, known + CHANNELS, TILES, ROWS, BR, 1, 0, eps,
        CUMULATIVE=False, BT=2, BLOCK=BC,
    )  # fmt: skip
    mean, var = moments(x)
    assert_equal(room[0].array(-1), mean)
    assert_equal(room[1].array(-1), var)
    root = np.array([1 / sp.sqrt(v + eps) for v in (*known_var, *room[1].array(-1))], dtype=object)
    assert_equal(out.array(-1), np.concatenate([root, gamma * root, beta]))


@pytest.mark.parametrize("handed_on", [False, True])
def test_finalize_backward(handed_on: bool) -> None:
    dscale, dbeta, root, scale = given = [unknowns(name, CHANNELS) for name in ("dscale", "dbeta", "root", "scale")]
    others = [unknowns(name, CHANNELS) if handed_on else None for name in ("dmean", "dvar")]
    memories = (None if v is None else Memory(list(v)) for v in (*given, *others))
    out = Memory(3 * CHANNELS)
    launch(statistics._finalize_backward_kernel, (1,), *memories, out, CHANNELS, BLOCK=4)
    dmean, dvar = (0 if v is None else v for v in others)
    assert_equal(out.array(-1), np.concatenate([dmean - dbeta * scale, dvar - dscale * scale * root**2 / 2, dscale * root]))


def _unknown_activation() -> dict[str, Callable[..., Any]]:
    """An arbitrary function and its derivative in the place of the activations."""
    value, slope = sp.Function("act"), sp.Function("slope")

    def over(function: Any, u: Any) -> Any:
        return Block(np.vectorize(lambda e: function(sp.expand(e)), otypes=[object])(u.values))

    return {"activate": lambda u, act, slope_of: over(value, u), "pull_back": lambda g, u, act, slope_of: g * over(slope, u)}


def slope_at(u: Any) -> Any:
    return np.vectorize(lambda e: sp.Function("slope")(sp.expand(e)), otypes=[object])(u)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_residual_backward(normalised: bool, gated: bool) -> None:
    """G with its statistics' backward, and the three sums (two with a gate), tile by tile, for an unknown activation."""
    dout, y, r, out = (unknowns(name, ROWS, CHANNELS) for name in ("d", "y", "r", "out"))
    a, b, mean, y_mean, y_scale, y_beta, r_mean, r_scale, r_beta = (
        unknowns(name, CHANNELS) for name in ("a", "b", "mean", "ym", "ys", "yb", "rm", "rs", "rb")
    )
    of_r = [Memory(list(v)) for v in (r_mean, r_scale, r_beta)] if normalised else [None] * 3
    vectors = [Memory(list(v)) for v in (a, b, mean)], [Memory(list(v)) for v in (y_mean, y_scale, y_beta)]
    gate = unknowns("gate", IMAGES, CHANNELS)
    planes = 1 + normalised + (not gated)
    g, partial = Memory(ROWS * CHANNELS), Memory(planes * TILES * CHANNELS)
    pitch = CHANNELS + 1
    launch(
        residual._residual_backward_kernel, GRID, pitched(dout, pitch), None, *vectors[0], *(pitched(v, pitch) for v in (y, r, out)),
        *vectors[1], Memory(list(gate.ravel())) if gated else None, *of_r, g, partial,
        pitch, 0, pitch, pitch, pitch, CHANNELS, ROWS, TILES, POSITIONS, CHANNELS,
        FACTOR=1.0, ACT="unknown", SLOPE=0.0, WIDE=False, UNIT=1, BR=BR, BC=BC, replaced=_unknown_activation(),
    )  # fmt: skip
    total = dout + a * (out - mean) + b
    u = ((y - y_mean) * y_scale + y_beta) * (gate[IMAGE_OF_ROW] if gated else 1)
    u = u + ((r - r_mean) * r_scale + r_beta if normalised else r)
    expected = total * slope_at(u)
    assert_equal(g.array(-1), expected)
    sums = [expected, *([] if gated else [expected * (y - y_mean)]), *([expected * (r - r_mean)] if normalised else [])]
    assert_equal(partial.array(planes, TILES, CHANNELS).sum(1), [s.sum(0) for s in sums])


tl: Any = None  # launch() gives the kernels below theirs
output_gradient, input_gradient, store_sums, store_join_gradient, load_gate, load_raw, load_vector, by_pixel, by_channel = (
    edges.output_gradient, edges.input_gradient, edges.store_sums, edges.store_join_gradient,
    edges.load_gate, edges.load_raw, edges.load_vector, edges.by_pixel, edges.by_channel,
)  # fmt: skip


def _output_gradient_kernel(p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, mean_ptr, rate, out_ptr, pitch, rows, channels):  # type: ignore[no-untyped-def]
    row, channel = tl.arange(0, 8)[:, None], tl.arange(0, 4)[None, :]
    valid = channel < channels
    inside = (row < rows) & valid
    d = output_gradient(p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, mean_ptr, rate, pitch, pitch, row, channel, inside, valid, False)
    tl.store(out_ptr + row * channels + channel, d, mask=inside)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("corrected", [False, True, "to be divided"])
def test_output_gradient(scaled: bool, corrected: bool | str) -> None:
    """dY = s * P + a * (y - mean) + b, where a is 2 dvar / M and b dmean / M."""
    p, y = unknowns("p", ROWS, CHANNELS), unknowns("y", ROWS, CHANNELS)
    s, a, b, mean = (unknowns(name, CHANNELS) for name in ("s", "a", "b", "mean"))
    out, pitch = Memory(ROWS * CHANNELS), CHANNELS + 1
    given = [Memory(list(v)) for v in (a, b, mean)] if corrected else [None] * 3
    count = sp.Symbol("M", positive=True)
    rate = 1 / count if corrected == "to be divided" else None
    launch(
        _output_gradient_kernel, (1,), pitched(p, pitch), pitched(y, pitch) if corrected else None, Memory(list(s)) if scaled else None,
        *given, rate, out, pitch, ROWS, CHANNELS,
    )  # fmt: skip
    if rate is not None:
        a, b = 2 * a / count, b / count
    assert_equal(out.array(-1), (s * p if scaled else p) + (a * (y - mean) + b if corrected else 0))


def _input_gradient_kernel(  # type: ignore[no-untyped-def]
    g_ptr, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, dx_ptr, sums_ptr, gate_sums_ptr, pitch, rows, channels, AXIS
):
    row, channel = tl.arange(0, 8), tl.arange(0, 4)
    row_valid, valid = row < rows, channel < channels
    inside = by_pixel(row_valid, AXIS) & by_channel(valid, AXIS)
    place = by_pixel(row, AXIS) * channels + by_channel(channel, AXIS)
    g = tl.load(g_ptr + place, mask=inside, other=0.0)
    x = load_raw(x_ptr, pitch, row, channel, row_valid, valid, False, AXIS)
    mean = load_vector(mean_ptr, channel, valid, AXIS)
    scale, beta = load_vector(scale_ptr, channel, valid, AXIS), load_vector(beta_ptr, channel, valid, AXIS)
    g, first, second = input_gradient(
        g, x, mean, scale, beta, gate_ptr, channel, row_valid, valid, 0, channels, "unknown", 0.0, AXIS
    )
    store_sums(first, second, mean_ptr, gate_ptr, sums_ptr, gate_sums_ptr, channel, valid, 0, 1, channels, AXIS)
    tl.store(dx_ptr + place, g, mask=inside)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("gated", [False, True])
def test_input_gradient(gated: bool, axis: int) -> None:
    """scale * P with SP and SPX; behind a gate the gradient at the gate's input, and the gate's own."""
    g, x = unknowns("g", ROWS, CHANNELS), unknowns("x", ROWS, CHANNELS)
    mean, scale, beta, gate = (unknowns(name, CHANNELS) for name in ("mean", "scale", "beta", "gate"))
    dx, sums, gate_sums, pitch = Memory(ROWS * CHANNELS), Memory(2 * CHANNELS), Memory(CHANNELS), CHANNELS + 1
    launch(
        _input_gradient_kernel, (1,), Memory(list(g.ravel())), pitched(x, pitch), *(Memory(list(v)) for v in (mean, scale, beta)),
        Memory(list(gate)) if gated else None, dx, sums, gate_sums, pitch, ROWS, CHANNELS, axis, replaced=_unknown_activation(),
    )  # fmt: skip
    u = (x - mean) * scale + beta
    if gated:
        value = np.vectorize(lambda e: sp.Function("act")(sp.expand(e)), otypes=[object])(u)
        assert_equal(dx.array(-1), g * gate)
        assert_equal(gate_sums.array(-1), (g * value).sum(0))
    else:
        p = g * slope_at(u)
        assert_equal(dx.array(-1), p * scale)
        assert_equal(sums.array(2, CHANNELS), [p.sum(0), (p * (x - mean)).sum(0)])


def _join_kernel(  # type: ignore[no-untyped-def]
    g_ptr, y_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, r_ptr, r_mean_ptr, r_scale_ptr, r_beta_ptr, dx_ptr, sums_ptr,
    pitch, rows, positions, channels, AXIS
):  # fmt: skip
    row, channel = tl.arange(0, 8), tl.arange(0, 4)
    row_valid, valid = row < rows, channel < channels
    inside = by_pixel(row_valid, AXIS) & by_channel(valid, AXIS)
    g = tl.load(g_ptr + by_pixel(row, AXIS) * channels + by_channel(channel, AXIS), mask=inside, other=0.0)
    y = load_raw(y_ptr, pitch, row, channel, row_valid, valid, False, AXIS)
    r = load_raw(r_ptr, pitch, row, channel, row_valid, valid, False, AXIS)
    mean, r_mean = load_vector(mean_ptr, channel, valid, AXIS), load_vector(r_mean_ptr, channel, valid, AXIS)
    scale, r_scale = load_vector(scale_ptr, channel, valid, AXIS), load_vector(r_scale_ptr, channel, valid, AXIS)
    beta, r_beta = load_vector(beta_ptr, channel, valid, AXIS), load_vector(r_beta_ptr, channel, valid, AXIS)
    gate = load_gate(gate_ptr, row // positions, channels, channel, row_valid, valid, AXIS)
    store_join_gradient(
        g, y, mean, scale, beta, gate, r, r_mean, r_scale, r_beta, dx_ptr, sums_ptr, channels,
        row, channel, row_valid, valid, 0, 1, channels, "unknown", 0.0, True, False, AXIS,
    )  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_join_gradient(axis: int, gated: bool) -> None:
    """What a convolution's dgrad finishes of the join's: the other readers' gradient added, the mask, the three sums (two with a gate)."""
    g, more, y, r = (unknowns(name, ROWS, CHANNELS) for name in ("g", "more", "y", "r"))
    vectors = [unknowns(name, CHANNELS) for name in ("ym", "ys", "yb", "rm", "rs", "rb")]
    memories = [Memory(list(v)) for v in vectors]
    gate, planes = unknowns("gate", IMAGES, CHANNELS), 2 if gated else 3
    dx, sums, pitch = Memory(list(more.ravel())), Memory(planes * CHANNELS), CHANNELS + 1
    launch(
        _join_kernel, (1,), Memory(list(g.ravel())), pitched(y, pitch), *memories[:3], Memory(list(gate.ravel())) if gated else None,
        pitched(r, pitch), *memories[3:], dx, sums, pitch, ROWS, POSITIONS, CHANNELS, axis, replaced=_unknown_activation(),
    )  # fmt: skip
    y_mean, y_scale, y_beta, r_mean, r_scale, r_beta = vectors
    factor = gate[IMAGE_OF_ROW] if gated else 1
    p = (g + more) * slope_at(((y - y_mean) * y_scale + y_beta) * factor + (r - r_mean) * r_scale + r_beta)
    assert_equal(dx.array(-1), p)
    of_y = [] if gated else [(p * (y - y_mean)).sum(0)]
    assert_equal(sums.array(planes, CHANNELS), [p.sum(0), *of_y, (p * (r - r_mean)).sum(0)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("g = tl.where(inside, pull_back(g, u, ACT, SLOPE), 0.0)", "g = pull_back(g, u, ACT, SLOPE)"),
        ("r - tl.load(r_mean_ptr", "r - tl.load(y_mean_ptr"),
        ("(row < rows) & valid", "(row < rows + 1) & valid"),
        ("a, g + b)", "a, g)"),
        ("place += row_tiles * channels\n        centred = r", "centred = r"),
    ],
)
def test_an_error_in_a_kernel_has_no_proof(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = edited(old, new)(residual._residual_backward_kernel.fn)
    monkeypatch.setattr(residual, "_residual_backward_kernel", SimpleNamespace(fn=wrong))
    with pytest.raises(NotProved):
        test_residual_backward(True, False)
