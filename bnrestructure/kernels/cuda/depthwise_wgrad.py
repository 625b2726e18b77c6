"""Depthwise convolution, weight gradient: every tap's products are kept apart in registers and summed once at the end.

The rows are split among programs whose results are added in a second pass: no atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activation_constants
from bnrestructure.kernels.cuda.edges import EdgePixels, output_gradient
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import pixels, vectors
from bnrestructure.kernels.cuda.patches import is_any_read, patches_in, tap_at, transformed_pixel, with_added_product, with_last
from bnrestructure.kernels.cuda.precision import in_units
from bnrestructure.kernels.cuda.problem import geometry_constants, is_padded, triton_dtype, unit_of
from bnrestructure.kernels.cuda.sums import Sums

__all__ = ["wgrad"]


@triton.jit
def _add_row(
    totals, gradients, row, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, x_pitch, n, ih, left, channel, channels, lanes, valid, H, W,
    ACT: tl.constexpr, SLOPE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    UNROLLED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``totals``, by tap, with what one row of input pixels gives them: of UNROLLED kernels row ``row`` of what the patch reads; of others
    what the program's own row of taps reads. ``gradients`` are by output of the patch.
    """
    for column in tl.static_range((WIDTH - 1) * SW + (KW - 1) * DW + 1):
        if is_any_read(column, WIDTH, SW, KW, DW):
            z = transformed_pixel(
                x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, x_pitch, n, ih, left + column, channel, channels, lanes, valid, H, W,
                ACT, SLOPE, PADDED, DTYPE, WIDE,
            )  # fmt: skip
            for output in tl.static_range(HEIGHT * WIDTH):
                if tap_at(column - output % WIDTH * SW, DW, KW) >= 0:
                    if not UNROLLED:
                        totals = with_added_product(totals, tap_at(column - output % WIDTH * SW, DW, KW), z, gradients[output])
                    elif tap_at(row - output // WIDTH * SH, DH, KH) >= 0:
                        totals = with_added_product(
                            totals, tap_at(row - output // WIDTH * SH, DH, KH) * KW + tap_at(column - output % WIDTH * SW, DW, KW),
                            z, gradients[output],
                        )  # fmt: skip
    return totals


@triton.jit(do_not_specialize=("patches", "steps", "H", "W", "OH", "OW"))
def _depthwise_wgrad_kernel(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, partial_ptr, bias_ptr,
    p_pitch, y_pitch, x_pitch, patches, steps, channels, H, W, OH, OW,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PADDED: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    UNROLLED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    p_pitch, y_pitch = in_units(p_pitch, UNIT), in_units(y_pitch, UNIT)
    x_pitch, channels = in_units(x_pitch, UNIT), in_units(channels, UNIT)
    split = tl.program_id(1)
    tap_row = tl.program_id(2)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    valid = channel < channels
    across = tl.cdiv(OW, WIDTH)
    of_image = tl.cdiv(OH, HEIGHT) * across
    totals = (tl.zeros((BR, BC), dtype=tl.float32),) * TAPS
    bias = tl.zeros((BR, BC), dtype=tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(patches, BR))):
        patch = step * BR + tl.arange(0, BR)
        lanes = patch < patches
        n = patch // of_image
        oh = (patch - n * of_image) // across * HEIGHT
        ow = patch % across * WIDTH
        gradients = ()
        for output in tl.static_range(HEIGHT * WIDTH):
            meets = lanes & (oh + output // WIDTH < OH) & (ow + output % WIDTH < OW)
            inside = meets[:, None] & valid[None, :]
            pixel = ((n * OH + oh + output // WIDTH) * OW + ow + output % WIDTH)[:, None]
            d = output_gradient(
                p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, p_pitch, y_pitch, pixel, channel[None, :], inside, valid[None, :], WIDE
            )
            d = tl.where(inside, d, 0.0)
            bias += d
            gradients = with_last(gradients, d)
        if UNROLLED:
            for row in tl.static_range((HEIGHT - 1) * SH + (KH - 1) * DH + 1):
                if is_any_read(row, HEIGHT, SH, KH, DH):
                    totals = _add_row(
                        totals, gradients, row, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
                        x_pitch, n, oh * SH - PH + row, ow * SW - PW, channel, channels, lanes, valid, H, W,
                        ACT, SLOPE, KH, KW, SH, SW, DH, DW, PADDED, DTYPE, WIDE, UNROLLED, HEIGHT, WIDTH,
                    )  # fmt: skip
        else:
            totals = _add_row(
                totals, gradients, tap_row, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
                x_pitch, n, oh * SH - PH + tap_row * DH, ow * SW - PW, channel, channels, lanes, valid, H, W,
                ACT, SLOPE, KH, KW, SH, SW, DH, DW, PADDED, DTYPE, WIDE, UNROLLED, HEIGHT, WIDTH,
            )  # fmt: skip
    place = partial_ptr + (split * channels + channel) * (KH * KW) + tap_row * TAPS
    for tap in tl.static_range(TAPS):
        tl.store(place + tap, tl.sum(totals[tap], 0), mask=valid)
    if bias_ptr is not None:  # every row of taps has the same
        tl.store(bias_ptr + split * channels + channel, tl.sum(bias, 0), mask=valid & (tap_row == 0))


def wgrad(
    edge: EdgePixels,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    needs_bias: bool,
    sums: Sums,
) -> tuple[Tensor, Tensor | None]:
    """(the weight's gradient in its own shape, dtype and memory format; the bias's, [C] in ``dtype``, or None).

    The former is due in ``sums``.
    """
    batch, channels, h, w = x.shape
    kernel = tuple(weight.shape[2:])
    source = pixels(x)
    tile = tiles.depthwise_wgrad(channels, edge.size, kernel, geometry.stride)
    tap_rows, taps = (1, kernel[0] * kernel[1]) if tile.unrolled else kernel
    patches = batch * patches_in(edge.size, tile.height, tile.width)
    programs = tiles.cdiv(channels, tile.channels)
    all_steps = tiles.cdiv(patches, tile.rows)
    steps = tiles.cdiv(all_steps, tiles.splits(programs * tap_rows, all_steps))
    splits = tiles.cdiv(all_steps, steps)
    partial = torch.empty(splits, channels, *kernel, 1, dtype=torch.float32, device=x.device)
    bias = torch.empty(splits, channels, dtype=torch.float32, device=x.device) if needs_bias else None
    mean, scale, beta, gate = vectors(transform.mean, transform.scale, transform.beta, transform.gate)
    launch(
        _depthwise_wgrad_kernel, (programs, splits, tap_rows),
        *edge.pointers, source.tensor, mean, scale, beta, gate, partial, bias,
        *edge.pitches, source.pitch, patches, steps, channels, h, w, *edge.size,
        **activation_constants(transform.act), **geometry_constants(geometry, kernel),
        PADDED=is_padded(geometry), DTYPE=triton_dtype(dtype), WIDE=edge.wide or source.wide,
        UNIT=unit_of(*edge.pitches, source.pitch, channels), TAPS=taps, **tile.constants, warps=tile.warps,
    )  # fmt: skip
    return sums.weight_gradient(partial, weight), None if bias is None else bias.sum(0).to(dtype)
