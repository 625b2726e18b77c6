"""The fused convolution's weight gradient: [C_out, pixels] by [pixels, taps * C_in], both transformed as they are
loaded.

The reduction over the pixels is split among programs whose results are added in a second pass: no atomics, and the
same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activate, activation_constants, pre_activation
from bnrestructure.kernels.cuda.edges import EdgePixels, output_gradient
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import pixels, vectors
from bnrestructure.kernels.cuda.precision import in_units, multiply, offset, restored_gradient, rounded, rounded_gradient
from bnrestructure.kernels.cuda.problem import (
    geometry_constants,
    is_gathered,
    is_heavy,
    is_padded,
    precision_of,
    triton_dtype,
    unit_of,
)
from bnrestructure.kernels.cuda.sums import Sums

__all__ = ["wgrad"]


@triton.jit(do_not_specialize=("rows", "steps", "H", "W", "OH", "OW"))
def _dense_wgrad_kernel(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
    partial_ptr, bias_ptr,
    p_pitch, y_pitch, x_pitch, rows, steps, H, W, OH, OW, inputs, outputs, group_inputs, group_outputs,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GATHERED: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    p_pitch, y_pitch, x_pitch = in_units(p_pitch, UNIT), in_units(y_pitch, UNIT), in_units(x_pitch, UNIT)
    inputs, outputs = in_units(inputs, UNIT), in_units(outputs, UNIT)
    group_inputs, group_outputs = in_units(group_inputs, UNIT), in_units(group_outputs, UNIT)
    row_tiles = tl.cdiv(group_outputs, BM)
    group = tl.program_id(1)
    split = tl.program_id(2)
    out = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    out_valid = out < group_outputs
    out_channel = group * group_outputs + out
    column_tile = tl.program_id(0) // row_tiles
    if GATHERED:  # a tile's columns run through taps and channels alike
        column = column_tile * BN + tl.arange(0, BN)
        column_valid = column < KH * KW * group_inputs
        tap = column // group_inputs
        channel = column - tap * group_inputs
        dh = (tap // KW * DH)[None, :]
        dw = (tap % KW * DW)[None, :]
    else:  # a tile's columns are some channels of one tap
        blocks = tl.cdiv(group_inputs, BN)
        tap = column_tile // blocks
        channel = (column_tile - tap * blocks) * BN + tl.arange(0, BN)
        column_valid = channel < group_inputs
        column = tap * group_inputs + channel
        dh = tap // KW * DH
        dw = tap % KW * DW
    in_channel = (group * group_inputs + channel)[None, :]

    total = tl.zeros((BM, BN), dtype=tl.float32)
    bias = tl.zeros((BM,), dtype=tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(rows, BK))):
        row = step * BK + tl.arange(0, BK)
        row_valid = row < rows
        n = row // (OH * OW)
        position = row - n * (OH * OW)
        inside = row_valid[:, None] & out_valid[None, :]
        d = output_gradient(
            p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, p_pitch, y_pitch,
            row[:, None], out_channel[None, :], inside, out_valid[None, :], WIDE,
        )  # fmt: skip
        if RAGGED:  # rows beyond the last count for nothing, whatever z is there
            d = tl.where(inside, d, 0.0)
        if bias_ptr is not None:
            bias += tl.sum(d, 0)
        ih = (position // OW * SH - PH)[:, None] + dh
        iw = (position % OW * SW - PW)[:, None] + dw
        inside = row_valid[:, None] & column_valid[None, :]
        if PADDED:
            inside = inside & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        pixel = (n[:, None] * H + ih) * W + iw
        z = tl.load(x_ptr + offset(pixel, x_pitch, WIDE) + in_channel, mask=inside, other=0.0).to(tl.float32)
        if mean_ptr is not None or gate_ptr is not None or ACT != "identity":
            u = pre_activation(z, mean_ptr, scale_ptr, beta_ptr, in_channel, column_valid[None, :])
            z = activate(u, ACT, SLOPE)
            if gate_ptr is not None:
                z *= tl.load(gate_ptr + n[:, None] * inputs + in_channel, mask=inside, other=0.0)
            if PADDED:
                z = tl.where(inside, z, 0.0)
        total = multiply(tl.trans(rounded_gradient(d, a_ptr, DTYPE)), rounded(z, DTYPE), total, PRECISION, True, PART)

    width = KH * KW * group_inputs
    place = (split.to(tl.int64) * outputs + out_channel[:, None]) * width + column[None, :]
    total = restored_gradient(total, a_ptr, DTYPE)
    tl.store(partial_ptr + place, total, mask=out_valid[:, None] & column_valid[None, :])
    if bias_ptr is not None:  # noqa: SIM102 (decided at compile time, the other one at run time)
        if column_tile == 0:
            tl.store(bias_ptr + split * outputs + out_channel, bias, mask=out_valid)


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
    """(the weight's gradient in its own shape, dtype and memory format; the bias's, [C_out] in ``dtype``, or None).

    The former is due in ``sums``.
    """
    _, inputs, h, w = x.shape
    outputs, group_inputs, *kernel = weight.shape
    source = pixels(x)
    group_outputs = outputs // geometry.groups
    gathered = is_gathered(group_inputs, kernel)
    taps = kernel[0] * kernel[1]
    columns = group_inputs * taps if gathered else group_inputs
    sizes = (*edge.pitches, source.pitch, group_inputs, group_outputs)
    heavy = is_heavy(transform, *sizes)
    tile = tiles.dense_wgrad(group_outputs, columns, dtype.itemsize, gathered, heavy)
    column_tiles = tiles.cdiv(columns, tile.n) * (1 if gathered else taps)
    programs = tiles.cdiv(group_outputs, tile.m) * column_tiles
    rows = edge.p.rows
    all_steps = tiles.cdiv(rows, tile.k)
    steps = tiles.cdiv(all_steps, tiles.splits(programs * geometry.groups, all_steps, tiles.steps_per_split(tile, dtype.itemsize)))
    splits = tiles.cdiv(all_steps, steps)
    partial = torch.empty(splits, outputs, *kernel, group_inputs, dtype=torch.float32, device=x.device)
    bias = torch.empty(splits, outputs, dtype=torch.float32, device=x.device) if needs_bias else None
    mean, scale, beta, gate = vectors(transform.mean, transform.scale, transform.beta, transform.gate)
    launch(
        _dense_wgrad_kernel, (programs, geometry.groups, splits),
        *edge.pointers, source.tensor, mean, scale, beta, gate, partial, bias,
        *edge.pitches, source.pitch, rows, steps, h, w, *edge.size, inputs, outputs, group_inputs, group_outputs,
        **activation_constants(transform.act), **geometry_constants(geometry, kernel),
        GATHERED=gathered, PADDED=is_padded(geometry), RAGGED=rows % tile.k != 0,
        WIDE=edge.wide or source.wide, PRECISION=precision_of(dtype), DTYPE=triton_dtype(dtype),
        UNIT=unit_of(*sizes), BM=tile.m, BN=tile.n, BK=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return sums.weight_gradient(partial, weight), None if bias is None else bias.sum(0).to(dtype)
