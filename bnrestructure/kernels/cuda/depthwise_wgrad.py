"""Depthwise convolution, weight gradient: every tap's products are kept apart in registers and summed once at the end.

The rows are split among programs whose results are added in a second pass: no atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activate, activation_constants, pre_activation
from bnrestructure.kernels.cuda.dense_wgrad import weight_gradient
from bnrestructure.kernels.cuda.edges import EdgePixels, output_gradient
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import pixels, vectors
from bnrestructure.kernels.cuda.precision import in_units, offset, rounded
from bnrestructure.kernels.cuda.problem import geometry_constants, triton_dtype, unit_of
from bnrestructure.ops.edges import ConvGeometry, Transform

__all__ = ["wgrad"]


@triton.jit(do_not_specialize=("rows", "steps", "H", "W", "OH", "OW"))
def _depthwise_wgrad_kernel(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
    partial_ptr, bias_ptr,
    p_pitch, y_pitch, x_pitch, rows, steps, channels, H, W, OH, OW,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, TAPS: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    p_pitch, y_pitch = in_units(p_pitch, UNIT), in_units(y_pitch, UNIT)
    x_pitch, channels = in_units(x_pitch, UNIT), in_units(channels, UNIT)
    split = tl.program_id(1)
    channel = (tl.program_id(0) * BC + tl.arange(0, BC))[None, None, :]
    valid = channel < channels
    tap = tl.arange(0, TAPS)[:, None, None]  # TAPS is KH * KW rounded up to a power of two
    dh = tap // KW * DH - PH
    dw = tap % KW * DW - PW
    total = tl.zeros((TAPS, BR, BC), dtype=tl.float32)
    bias = tl.zeros((1, BR, BC), dtype=tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(rows, BR))):
        row = (step * BR + tl.arange(0, BR))[None, :, None]
        row_valid = row < rows
        n = row // (OH * OW)
        position = row - n * (OH * OW)
        inside = row_valid & valid
        d = output_gradient(
            p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, p_pitch, y_pitch, row, channel, inside, valid, WIDE
        )
        d = tl.where(inside, d, 0.0)
        bias += d
        ih = position // OW * SH + dh
        iw = position % OW * SW + dw
        inside = inside & (tap < KH * KW) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        pixel = (n * H + ih) * W + iw
        x = tl.load(x_ptr + offset(pixel, x_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
        u = pre_activation(x, mean_ptr, scale_ptr, beta_ptr, channel, valid)
        z = activate(u, ACT, SLOPE)
        if gate_ptr is not None:
            z *= tl.load(gate_ptr + n * channels + channel, mask=row_valid & valid, other=0.0)
        z = rounded(tl.where(inside, z, 0.0), DTYPE).to(tl.float32)
        total = tl.fma(z, d, total)
    column = (tl.program_id(0) * BC + tl.arange(0, BC))[None, :]
    taps = tl.arange(0, TAPS)[:, None]
    place = (split * channels + column) * (KH * KW) + taps
    tl.store(partial_ptr + place, tl.sum(total, 1), mask=(taps < KH * KW) & (column < channels))
    if bias_ptr is not None:
        tl.store(bias_ptr + split * channels + column, tl.sum(bias, 1), mask=column < channels)


def wgrad(
    edge: EdgePixels,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    needs_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """(the weight's gradient in its own shape, dtype and memory format; the bias's, [C] in ``dtype``, or None)."""
    _, channels, h, w = x.shape
    kernel = weight.shape[2:]
    taps = kernel[0] * kernel[1]
    source = pixels(x)
    tile = tiles.depthwise_wgrad(channels, taps)
    rows = edge.p.rows
    programs = triton.cdiv(channels, tile.channels)
    all_steps = triton.cdiv(rows, tile.rows)
    steps = triton.cdiv(all_steps, tiles.splits(programs, all_steps))
    splits = triton.cdiv(all_steps, steps)
    partial = torch.empty(splits, channels, *kernel, 1, dtype=torch.float32, device=x.device)
    bias = torch.empty(splits, channels, dtype=torch.float32, device=x.device) if needs_bias else None
    mean, scale, beta, gate = vectors(transform.mean, transform.scale, transform.beta, transform.gate)
    launch(
        _depthwise_wgrad_kernel, (programs, splits),
        *edge.pointers, source.tensor, mean, scale, beta, gate, partial, bias,
        *edge.pitches, source.pitch, rows, steps, channels, h, w, *edge.size,
        **activation_constants(transform.act), **geometry_constants(geometry, kernel),
        DTYPE=triton_dtype(dtype), WIDE=edge.wide or source.wide, TAPS=triton.next_power_of_2(taps),
        UNIT=unit_of(*edge.pitches, source.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return weight_gradient(partial, weight), None if bias is None else bias.sum(0).to(dtype)
