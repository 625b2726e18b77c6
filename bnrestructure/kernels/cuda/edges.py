"""The two ends of the backward kernels: reading dY = s * P + a * (y - mean) + b, and storing a raw input's gradient."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge
from bnrestructure.kernels.cuda.activation import activate, pre_activation, pull_back
from bnrestructure.kernels.cuda.layout import Pixels, pixels, vectors
from bnrestructure.kernels.cuda.precision import dithered, offset, rounded

__all__ = [
    "EdgePixels", "edge_pixels", "input_gradient", "output_gradient",
    "store_gradient", "store_input_gradient", "store_join_gradient", "store_sums",
]  # fmt: skip


class EdgePixels(NamedTuple):
    """P, and y where the edge has one, in memory that kernels can address, with the edge's vectors in fp32."""

    p: Pixels
    y: Pixels | None
    s: Tensor | None
    a: Tensor | None
    b: Tensor | None
    mean: Tensor | None

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """The kernels' arguments p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr."""
        y = None if self.y is None else self.y.tensor
        return self.p.tensor, y, self.s, self.a, self.b, self.mean

    @property
    def pitches(self) -> tuple[int, int]:
        """The kernels' arguments p_pitch, y_pitch."""
        return self.p.pitch, 0 if self.y is None else self.y.pitch

    @property
    def size(self) -> tuple[int, int]:
        """(OH, OW)."""
        _, _, h, w = self.p.tensor.shape
        return h, w

    @property
    def wide(self) -> bool:
        """Whether offsets need 64 bits."""
        return self.p.wide or (self.y is not None and self.y.wide)


def edge_pixels(dy: Tensor, edge: BackwardEdge) -> EdgePixels:
    """``dy`` [N, C, OH, OW] of any strides, with its edge."""
    s, a, b, mean = vectors(edge.s, edge.a, edge.b, edge.mean)
    if a is None or edge.y is None:
        return EdgePixels(pixels(dy), None, s, None, None, None)
    return EdgePixels(pixels(dy), pixels(edge.y), s, a, b, mean)


@triton.jit
def output_gradient(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, mean_ptr, p_pitch, y_pitch, pixel, channel, inside, valid, WIDE: tl.constexpr
):  # fmt: skip
    """A block of dY in fp32. Where not ``inside``: 0 without a, else b - a * mean, to be masked where it can matter."""
    d = tl.load(p_ptr + offset(pixel, p_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    if s_ptr is not None:
        d *= tl.load(s_ptr + channel, mask=valid, other=0.0)
    if a_ptr is not None:
        y = tl.load(y_ptr + offset(pixel, y_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + channel, mask=valid, other=0.0)
        b = tl.load(b_ptr + channel, mask=valid, other=0.0)
        mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)
        d = tl.fma(y - mean, a, d + b)
    return d


@triton.jit
def input_gradient(
    g, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, x_pitch, pixel, channel, row_valid, valid, image, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """From ``g`` [rows, channels] in fp32, the gradient at z, to (the gradient of raw x, two blocks whose sums over the rows are due).

    With vectors: P scaled; P and P * (x - mean). With a gate (all rows are of ``image``): the gradient at the gate's input, the mask *not*
    applied; the gate's own, twice. With neither nothing is due.
    """
    stored = row_valid[:, None] & valid[None, :]
    column = channel[None, :]
    first, second = g, g
    if mean_ptr is not None or gate_ptr is not None or ACT != "identity":
        x = tl.load(x_ptr + offset(pixel[:, None], x_pitch, WIDE) + column, mask=stored, other=0.0).to(tl.float32)
        u = pre_activation(x, mean_ptr, scale_ptr, beta_ptr, column, valid[None, :])
        if gate_ptr is not None:
            first = tl.where(stored, g * activate(u, ACT, SLOPE), 0.0)
            second = first
            g *= tl.load(gate_ptr + image * channels + channel, mask=valid, other=0.0)[None, :]
        else:
            g = tl.where(stored, pull_back(g, u, ACT, SLOPE), 0.0)
            if mean_ptr is not None:
                first = g
                second = g * (x - tl.load(mean_ptr + channel, mask=valid, other=0.0)[None, :])
                g *= tl.load(scale_ptr + channel, mask=valid, other=0.0)[None, :]
    return g, first, second


@triton.jit
def store_sums(first, second, mean_ptr, gate_ptr, partial_ptr, gate_partial_ptr, channel, valid, tile, tiles, channels):
    """The sums over the rows of what :func:`input_gradient` says is due, as tile ``tile``'s: SP and SPX in ``partial_ptr``
    [2, tiles, channels], or the gate's in ``gate_partial_ptr`` [tiles, channels].
    """
    if gate_ptr is not None:
        tl.store(gate_partial_ptr + tile * channels + channel, tl.sum(first, 0), mask=valid)
    elif mean_ptr is not None:
        sums = partial_ptr + tile * channels + channel
        tl.store(sums, tl.sum(first, 0), mask=valid)
        tl.store(sums + tiles * channels, tl.sum(second, 0), mask=valid)


@triton.jit
def store_gradient(
    g, dx_ptr, dx_pitch, pixel, channel, row_valid, valid, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, DITHER: tl.constexpr = False
):  # fmt: skip
    """``g`` stored in dx's dtype, or added to what is there."""
    stored = row_valid[:, None] & valid[None, :]
    place = dx_ptr + offset(pixel[:, None], dx_pitch, WIDE) + channel[None, :]
    if ACCUMULATE:
        g += tl.load(place, mask=stored, other=0.0).to(tl.float32)
    if DITHER:  # what all pixels have in common is kept on average
        tl.store(place, dithered(g, pixel[:, None], dx_ptr.dtype.element_ty), mask=stored)
    else:
        tl.store(place, rounded(g, dx_ptr.dtype.element_ty), mask=stored)


@triton.jit
def store_input_gradient(
    g, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, dx_ptr, partial_ptr, gate_partial_ptr,
    x_pitch, dx_pitch, pixel, channel, row_valid, valid, image, tile, tiles, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, DITHER: tl.constexpr = False,
):  # fmt: skip
    """The three above for a tile of one block."""
    g, first, second = input_gradient(
        g, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, x_pitch, pixel, channel, row_valid, valid, image, channels, ACT, SLOPE, WIDE
    )
    store_sums(first, second, mean_ptr, gate_ptr, partial_ptr, gate_partial_ptr, channel, valid, tile, tiles, channels)
    store_gradient(g, dx_ptr, dx_pitch, pixel, channel, row_valid, valid, ACCUMULATE, WIDE, DITHER)


@triton.jit
def store_join_gradient(
    g, y_ptr, mean_ptr, scale_ptr, beta_ptr, r_ptr, r_mean_ptr, r_scale_ptr, r_beta_ptr, dx_ptr, partial_ptr,
    y_pitch, r_pitch, dx_pitch, pixel, channel, row_valid, valid, tile, tiles, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """From ``g`` [rows, channels] in fp32, the gradient at a residual join's sum (what dx holds is added first), to what both of its
    operands share, stored to dx. Its sums SP, SPY and SPR are tile ``tile``'s in ``partial_ptr`` [planes, tiles, channels].
    """
    stored = row_valid[:, None] & valid[None, :]
    column = channel[None, :]
    place = dx_ptr + offset(pixel[:, None], dx_pitch, WIDE) + column
    if ACCUMULATE:
        g += tl.load(place, mask=stored, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offset(pixel[:, None], y_pitch, WIDE) + column, mask=stored, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + offset(pixel[:, None], r_pitch, WIDE) + column, mask=stored, other=0.0).to(tl.float32)
    u = pre_activation(y, mean_ptr, scale_ptr, beta_ptr, column, valid[None, :])
    u += pre_activation(r, r_mean_ptr, r_scale_ptr, r_beta_ptr, column, valid[None, :])
    g = tl.where(stored, pull_back(g, u, ACT, SLOPE), 0.0)
    tl.store(place, rounded(g, dx_ptr.dtype.element_ty), mask=stored)
    sums = partial_ptr + tile * channels + channel
    tl.store(sums, tl.sum(g, 0), mask=valid)
    if mean_ptr is not None:
        sums += tiles * channels
        mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)[None, :]
        tl.store(sums, tl.sum(g * (y - mean), 0), mask=valid)
    if r_mean_ptr is not None:
        sums += tiles * channels
        mean = tl.load(r_mean_ptr + channel, mask=valid, other=0.0)[None, :]
        tl.store(sums, tl.sum(g * (r - mean), 0), mask=valid)
