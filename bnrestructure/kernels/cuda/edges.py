"""The two ends of the backward kernels: reading dY = s * P + a * (y - mean) + b, and storing a raw input's gradient."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge
from bnrestructure.kernels.cuda.activation import activate, normalised, pull_back
from bnrestructure.kernels.cuda.layout import Pixels, pixels, vectors
from bnrestructure.kernels.cuda.precision import dithered, offset, rounded

__all__ = [
    "EdgePixels", "by_channel", "by_pixel", "edge_pixels", "input_gradient", "is_input_needed", "load_gate", "load_raw",
    "load_vector", "output_gradient", "store_gradient", "store_input_gradient", "store_join_gradient", "store_sums",
]  # fmt: skip


class EdgePixels(NamedTuple):
    """P, and y where the edge has one, in memory that kernels can address, with the edge's vectors in fp32."""

    p: Pixels
    y: Pixels | None
    s: Tensor | None
    a: Tensor | None
    b: Tensor | None
    mean: Tensor | None
    rate: float | None

    @property
    def pointers(self) -> tuple[Tensor | float | None, ...]:
        """The kernels' arguments p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate."""
        y = None if self.y is None else self.y.tensor
        return self.p.tensor, y, self.s, self.a, self.b, self.mean, self.rate

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
        return EdgePixels(pixels(dy), None, s, None, None, None, None)
    return EdgePixels(pixels(dy), pixels(edge.y), s, a, b, mean, None if edge.count is None else 1.0 / edge.count)


@triton.jit
def output_gradient(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, mean_ptr, rate, p_pitch, y_pitch, pixel, channel, inside, valid, WIDE: tl.constexpr
):  # fmt: skip
    """A block of dY in fp32. Where not ``inside``: 0 without a, else b - a * mean, to be masked where it can matter.

    ``rate`` is one over the count by which a and b are still to be divided, or None.
    """
    d = tl.load(p_ptr + offset(pixel, p_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    if s_ptr is not None:
        d *= tl.load(s_ptr + channel, mask=valid, other=0.0)
    if a_ptr is not None:
        y = tl.load(y_ptr + offset(pixel, y_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + channel, mask=valid, other=0.0)
        b = tl.load(b_ptr + channel, mask=valid, other=0.0)
        mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)
        if rate is not None:
            a *= 2.0 * rate
            b *= rate
        d = tl.fma(y - mean, a, d + b)
    return d


@triton.jit
def by_pixel(v, AXIS: tl.constexpr):
    """A vector of pixels as it broadcasts over a block whose dimension AXIS the pixels are."""
    return v[:, None] if AXIS == 0 else v[None, :]


@triton.jit
def by_channel(v, AXIS: tl.constexpr):
    """A vector of channels, likewise: theirs is the other dimension."""
    return v[None, :] if AXIS == 0 else v[:, None]


@triton.jit
def load_raw(x_ptr, x_pitch, pixel, channel, row_valid, valid, WIDE: tl.constexpr, AXIS: tl.constexpr = 0):
    """A block of a tensor as it is stored, [pixels, channels], or with AXIS = 1, the dimension of the pixels, [channels, pixels]."""
    stored = by_pixel(row_valid, AXIS) & by_channel(valid, AXIS)
    return tl.load(x_ptr + offset(by_pixel(pixel, AXIS), x_pitch, WIDE) + by_channel(channel, AXIS), mask=stored, other=0.0)


@triton.jit
def load_vector(v_ptr, channel, valid, AXIS: tl.constexpr = 0):
    """A channel's number each, as it broadcasts over such a block; None for None."""
    return tl.load(v_ptr + by_channel(channel, AXIS), mask=by_channel(valid, AXIS), other=0.0) if v_ptr is not None else None


@triton.jit
def load_gate(gate_ptr, image, channels, channel, row_valid, valid, AXIS: tl.constexpr = 0):
    """A block of a gate [N, C], the pixels being of these images; None for None."""
    stored = by_pixel(row_valid, AXIS) & by_channel(valid, AXIS)
    place = gate_ptr + by_pixel(image, AXIS) * channels + by_channel(channel, AXIS) if gate_ptr is not None else None
    return tl.load(place, mask=stored, other=0.0) if gate_ptr is not None else None


@triton.jit
def input_gradient(
    g, x, mean, scale, beta, gate_ptr, channel, row_valid, valid, image, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, AXIS: tl.constexpr = 0,
):  # fmt: skip
    """From ``g`` in fp32, the gradient at z, to (the gradient of raw x, two blocks whose sums over the pixels are due).

    ``x``, the raw input in fp32, and the vectors are blocks like g (see :func:`load_raw`); x is None where nothing depends on it.
    With vectors: P scaled; P and P * (x - mean). With a gate (all rows are of ``image``): the gradient at the gate's input, the mask *not*
    applied; the gate's own, twice. With neither nothing is due.
    """
    stored = by_pixel(row_valid, AXIS) & by_channel(valid, AXIS)
    first, second = g, g
    if x is not None:
        u = normalised(x, mean, scale, beta)
        if gate_ptr is not None:
            first = tl.where(stored, g * activate(u, ACT, SLOPE), 0.0)
            second = first
            g *= by_channel(tl.load(gate_ptr + image * channels + channel, mask=valid, other=0.0), AXIS)
        else:
            g = tl.where(stored, pull_back(g, u, ACT, SLOPE), 0.0)
            if mean is not None:
                first = g
                second = g * (x - mean)
                g *= scale
    return g, first, second


@triton.constexpr_function
def is_input_needed(mean_ptr, gate_ptr, act):
    """Whether :func:`input_gradient` asks for x."""
    return mean_ptr is not None or gate_ptr is not None or act != "identity"


@triton.jit
def store_sums(
    first, second, mean_ptr, gate_ptr, partial_ptr, gate_partial_ptr, channel, valid, tile, tiles, channels, AXIS: tl.constexpr = 0
):  # fmt: skip
    """The sums over the pixels of what :func:`input_gradient` says is due, as tile ``tile``'s: SP and SPX in ``partial_ptr``
    [2, tiles, channels], or the gate's in ``gate_partial_ptr`` [tiles, channels].
    """
    if gate_ptr is not None:
        tl.store(gate_partial_ptr + tile * channels + channel, tl.sum(first, AXIS), mask=valid)
    elif mean_ptr is not None:
        sums = partial_ptr + tile * channels + channel
        tl.store(sums, tl.sum(first, AXIS), mask=valid)
        tl.store(sums + tiles * channels, tl.sum(second, AXIS), mask=valid)


@triton.jit
def store_gradient(
    g, dx_ptr, dx_pitch, pixel, channel, row_valid, valid,
    ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, DITHER: tl.constexpr = False, AXIS: tl.constexpr = 0,
):  # fmt: skip
    """``g`` stored in dx's dtype, or added to what is there."""
    stored = by_pixel(row_valid, AXIS) & by_channel(valid, AXIS)
    place = dx_ptr + offset(by_pixel(pixel, AXIS), dx_pitch, WIDE) + by_channel(channel, AXIS)
    if ACCUMULATE:
        g += tl.load(place, mask=stored, other=0.0).to(tl.float32)
    if DITHER:  # what all pixels have in common is kept on average
        tl.store(place, dithered(g, by_pixel(pixel, AXIS), dx_ptr.dtype.element_ty), mask=stored)
    else:
        tl.store(place, rounded(g, dx_ptr.dtype.element_ty), mask=stored)


@triton.jit
def store_input_gradient(
    g, x_ptr, mean_ptr, scale_ptr, beta_ptr, dx_ptr, partial_ptr, x_pitch, dx_pitch,
    pixel, channel, row_valid, valid, tile, tiles, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, DITHER: tl.constexpr = False,
):  # fmt: skip
    """All of that for a tile of one block [pixels, channels], without a gate."""
    x, mean, scale, beta = None, None, None, None
    if is_input_needed(mean_ptr, None, ACT):
        x = load_raw(x_ptr, x_pitch, pixel, channel, row_valid, valid, WIDE).to(tl.float32)
        mean = load_vector(mean_ptr, channel, valid)
        scale = load_vector(scale_ptr, channel, valid)
        beta = load_vector(beta_ptr, channel, valid)
    g, first, second = input_gradient(g, x, mean, scale, beta, None, channel, row_valid, valid, 0, channels, ACT, SLOPE)
    store_sums(first, second, mean_ptr, None, partial_ptr, None, channel, valid, tile, tiles, channels)
    store_gradient(g, dx_ptr, dx_pitch, pixel, channel, row_valid, valid, ACCUMULATE, WIDE, DITHER)


@triton.jit
def store_join_gradient(
    g, y, mean, scale, beta, gate, r, r_mean, r_scale, r_beta, dx_ptr, partial_ptr, dx_pitch,
    pixel, channel, row_valid, valid, tile, tiles, channels,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, AXIS: tl.constexpr = 0,
):  # fmt: skip
    """From ``g`` in fp32, the gradient at a residual join's sum (what dx holds is added first), to what both of its operands share, stored
    to dx. The operands y and r in fp32, their vectors and y's gate are blocks like g. Its sums SP, SPY (not with a gate) and SPR are tile
    ``tile``'s in ``partial_ptr`` [planes, tiles, channels].
    """
    stored = by_pixel(row_valid, AXIS) & by_channel(valid, AXIS)
    place = dx_ptr + offset(by_pixel(pixel, AXIS), dx_pitch, WIDE) + by_channel(channel, AXIS)
    if ACCUMULATE:
        g += tl.load(place, mask=stored, other=0.0).to(tl.float32)
    u = normalised(y, mean, scale, beta)
    if gate is not None:
        u *= gate
    u += normalised(r, r_mean, r_scale, r_beta)
    g = tl.where(stored, pull_back(g, u, ACT, SLOPE), 0.0)
    tl.store(place, rounded(g, dx_ptr.dtype.element_ty), mask=stored)
    sums = partial_ptr + tile * channels + channel
    tl.store(sums, tl.sum(g, AXIS), mask=valid)
    if mean is not None and gate is None:
        sums += tiles * channels
        tl.store(sums, tl.sum(g * (y - mean), AXIS), mask=valid)
    if r_mean is not None:
        sums += tiles * channels
        tl.store(sums, tl.sum(g * (r - r_mean), AXIS), mask=valid)
