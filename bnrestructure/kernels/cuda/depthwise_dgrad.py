"""The fused depthwise convolution's input gradient, by patches of inputs (patches.py); its two ends are those of the dense kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activation_constants
from bnrestructure.kernels.cuda.dense_dgrad import InputGradient
from bnrestructure.kernels.cuda.depthwise_forward import weight_by_tap
from bnrestructure.kernels.cuda.edges import (
    EdgePixels,
    input_gradient,
    is_input_needed,
    load_raw,
    load_vector,
    output_gradient,
    store_gradient,
    store_sums,
)
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import destination, pixels, vectors
from bnrestructure.kernels.cuda.merge import partial_sums
from bnrestructure.kernels.cuda.patches import first_read, last_read, patches_in, tap_at, with_added_tap
from bnrestructure.kernels.cuda.precision import in_units
from bnrestructure.kernels.cuda.problem import geometry_constants, unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels
from bnrestructure.kernels.cuda.sums import Sums

__all__ = ["dgrad"]


@triton.jit
def _add_row(
    totals, row, p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, w_ptr, p_pitch, y_pitch,
    n, th, left, channel, channels, lanes, valid, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, WIDE: tl.constexpr,
    UNROLLED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``totals``, by input of the patch, with what one row of outputs gives them: of UNROLLED kernels the ``row``-th from the patch on, of
    others the one that tap row ``row`` meets.
    """
    for column in tl.static_range(first_read(SW, PW, KW, DW), last_read(WIDTH, SW, PW) + 1):
        tw = left + column
        meets = lanes & (th >= 0) & (th < OH) & (tw >= 0) & (tw < OW)
        inside = meets[:, None] & valid[None, :]
        pixel = ((n * OH + th) * OW + tw)[:, None]
        d = output_gradient(
            p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, p_pitch, y_pitch, pixel, channel[None, :], inside, valid[None, :], WIDE
        )
        if a_ptr is not None:  # elsewhere it is 0 where it is not inside
            d = tl.where(inside, d, 0.0)
        for own in tl.static_range(HEIGHT * WIDTH):
            if tap_at(own % WIDTH + PW - column * SW, DW, KW) >= 0:
                if not UNROLLED:
                    tap = row * KW + tap_at(own % WIDTH + PW - column * SW, DW, KW)
                    totals = with_added_tap(totals, own, d, w_ptr, tap, channel, channels, valid)
                elif tap_at(own // WIDTH + PH - row * SH, DH, KH) >= 0:
                    tap = tap_at(own // WIDTH + PH - row * SH, DH, KH) * KW + tap_at(own % WIDTH + PW - column * SW, DW, KW)
                    totals = with_added_tap(totals, own, d, w_ptr, tap, channel, channels, valid)
    return totals


@triton.jit(do_not_specialize=("image_tiles", "row_tiles", "H", "W", "OH", "OW"))
def _depthwise_dgrad_kernel(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, w_ptr, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
    dx_ptr, partial_ptr, gate_partial_ptr,
    p_pitch, y_pitch, x_pitch, dx_pitch, image_tiles, row_tiles, channels, H, W, OH, OW,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    UNROLLED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    p_pitch, y_pitch, channels = in_units(p_pitch, UNIT), in_units(y_pitch, UNIT), in_units(channels, UNIT)
    x_pitch, dx_pitch = in_units(x_pitch, UNIT), in_units(dx_pitch, UNIT)
    tile, channel = tile_and_channels(channels, BC)
    valid = channel < channels
    n = tile // image_tiles  # no tile spans two images, so that a tile's sum for the gate belongs to one of them
    patch = (tile - n * image_tiles) * BR + tl.arange(0, BR)
    across = tl.cdiv(W, WIDTH)
    h = patch // across * HEIGHT
    w = patch % across * WIDTH
    lanes = h < H
    totals = (tl.zeros((BR, BC), dtype=tl.float32),) * (HEIGHT * WIDTH)
    if UNROLLED:
        for row in tl.static_range(first_read(SH, PH, KH, DH), last_read(HEIGHT, SH, PH) + 1):
            totals = _add_row(
                totals, row, p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, w_ptr, p_pitch, y_pitch,
                n, h // SH + row, w // SW, channel, channels, lanes, valid, OH, OW,
                KH, KW, SH, SW, PH, PW, DH, DW, WIDE, UNROLLED, HEIGHT, WIDTH,
            )  # fmt: skip
    else:
        for row in range(KH):
            th = h + PH - row * DH
            meets = lanes
            if SH > 1:
                meets = lanes & (th % SH == 0) & (th >= 0)
            totals = _add_row(
                totals, row, p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, w_ptr, p_pitch, y_pitch,
                n, th // SH, w // SW, channel, channels, meets, valid, OH, OW,
                KH, KW, SH, SW, PH, PW, DH, DW, WIDE, UNROLLED, HEIGHT, WIDTH,
            )  # fmt: skip
    NEEDED: tl.constexpr = is_input_needed(mean_ptr, gate_ptr, ACT)
    mean = load_vector(mean_ptr, channel, valid)
    scale = load_vector(scale_ptr, channel, valid)
    beta = load_vector(beta_ptr, channel, valid)
    all_first = tl.zeros((BR, BC), dtype=tl.float32)
    all_second = tl.zeros((BR, BC), dtype=tl.float32)
    for own in tl.static_range(HEIGHT * WIDTH):
        row_valid = (h + own // WIDTH < H) & (w + own % WIDTH < W)
        pixel = (n * H + h + own // WIDTH) * W + w + own % WIDTH
        x = load_raw(x_ptr, x_pitch, pixel, channel, row_valid, valid, WIDE).to(tl.float32) if NEEDED else None
        g, first, second = input_gradient(
            totals[own], x, mean, scale, beta, gate_ptr, channel, row_valid, valid, n, channels, ACT, SLOPE
        )
        all_first += first
        all_second += second
        store_gradient(g, dx_ptr, dx_pitch, pixel, channel, row_valid, valid, ACCUMULATE, WIDE)
    store_sums(all_first, all_second, mean_ptr, gate_ptr, partial_ptr, gate_partial_ptr, channel, valid, tile, row_tiles, channels)


def dgrad(
    edge: EdgePixels,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    sums: Sums,
    accumulate: Tensor | None = None,
) -> InputGradient:
    """The gradient at x and what its epilogue sums, which is due in ``sums``; ``accumulate`` is added to in place and returned as dx."""
    batch, channels, h, w = x.shape
    source = pixels(x)
    dx = destination(x, x.dtype, accumulate)
    in_place = accumulate is not None and dx.tensor is accumulate
    gated = transform.gate is not None
    kernel = tuple(weight.shape[2:])
    tile = tiles.depthwise_dgrad(channels, (h, w), kernel, geometry.stride)
    image_tiles = tiles.cdiv(patches_in((h, w), tile.height, tile.width), tile.rows)
    row_tiles = batch * image_tiles
    has_sums = transform.mean is not None and not gated
    partial = partial_sums(2, row_tiles, channels, x.device) if has_sums else None
    gate_partial = partial_sums(1, row_tiles, channels, x.device) if gated else None
    mean, scale, beta, gate = vectors(transform.mean, transform.scale, transform.beta, transform.gate)
    launch(
        _depthwise_dgrad_kernel, (row_tiles * tiles.cdiv(channels, tile.channels),),
        *edge.pointers, weight_by_tap(weight, dtype), source.tensor, mean, scale, beta, gate,
        dx.tensor, partial, gate_partial,
        *edge.pitches, source.pitch, dx.pitch, image_tiles, row_tiles, channels, h, w, *edge.size,
        **activation_constants(transform.act), **geometry_constants(geometry, kernel),
        ACCUMULATE=in_place, WIDE=edge.wide or source.wide or dx.wide,
        UNIT=unit_of(*edge.pitches, source.pitch, dx.pitch, channels), **tile.constants, warps=tile.warps,
    )  # fmt: skip
    sum_p, sum_px = (None, None) if partial is None else sums.of(partial).unbind()
    dgate = None if gate_partial is None else sums.of(gate_partial.view(batch, -1, channels))
    result = dx.tensor if accumulate is None or in_place else accumulate.add_(dx.tensor)
    return InputGradient(result, sum_p, sum_px, dgate)
