"""The fused convolution's forward: an implicit matrix product, [pixels, taps * C_in] by [taps * C_in, C_out].

The prologue normalises and activates each block of x as it is loaded; the epilogue adds the bias, rounds, stores, and
takes the statistics of what it stored. The groups of a grouped convolution are programs of their own, side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, Join, Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activate, activation_constants, pre_activation
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import destination, empty_pixels, packed_weight, pixels, vectors
from bnrestructure.kernels.cuda.merge import merge_statistics, partial_statistics, store_partial_statistics
from bnrestructure.kernels.cuda.precision import in_units, is_swapped, multiply_rows, offset, representable, rounded
from bnrestructure.kernels.cuda.problem import geometry_constants, is_gathered, is_heavy, is_padded, precision_of, unit_of
from bnrestructure.kernels.cuda.programs import tile_and_group
from bnrestructure.kernels.unmerged import Mean, Unmerged, Wanted

__all__ = ["conv_forward"]


@triton.jit(do_not_specialize=("rows", "row_tiles", "H", "W", "OH", "OW"))
def _dense_forward_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
    r_ptr, r_mean_ptr, r_scale_ptr, r_beta_ptr, sum_ptr, partial_ptr,
    x_pitch, r_pitch, sum_pitch, y_pitch, rows, row_tiles, H, W, OH, OW, inputs, outputs, group_inputs, group_outputs,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GATHERED: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    FULL_ROWS: tl.constexpr, FULL_COLUMNS: tl.constexpr, FULL_STEPS: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    x_pitch, r_pitch = in_units(x_pitch, UNIT), in_units(r_pitch, UNIT)
    sum_pitch, y_pitch = in_units(sum_pitch, UNIT), in_units(y_pitch, UNIT)
    inputs, outputs = in_units(inputs, UNIT), in_units(outputs, UNIT)
    group_inputs, group_outputs = in_units(group_inputs, UNIT), in_units(group_outputs, UNIT)
    column_tiles = tl.cdiv(group_outputs, BN)
    tile, group = tile_and_group(column_tiles, GROUPS)  # neighbours share the rows of x
    row = tile * BM + tl.arange(0, BM)
    column = (tl.program_id(0) % column_tiles) * BN + tl.arange(0, BN)
    row_valid = (row < rows) | FULL_ROWS
    column_valid = (column < group_outputs) | FULL_COLUMNS
    POINTWISE: tl.constexpr = KH * KW * SH * SW == 1 and not PADDED  # an output pixel is the input pixel of the same number
    n = row // (OH * OW)
    position = row - n * (OH * OW)
    top = (position // OW) * SH - PH
    left = (position % OW) * SW - PW

    depth = group_inputs * (KH * KW) if GATHERED else group_inputs
    blocks = tl.cdiv(depth, BK)
    steps = blocks if GATHERED else blocks * (KH * KW)
    TRANSFORMED: tl.constexpr = mean_ptr is not None or gate_ptr is not None or r_ptr is not None or ACT != "identity"
    SAME_TYPE: tl.constexpr = x_ptr.dtype.element_ty == w_ptr.dtype.element_ty
    SWAPPED: tl.constexpr = is_swapped(BN)
    total = tl.zeros((BN, BM) if SWAPPED else (BM, BN), dtype=tl.float32)
    for step in range(0, steps):
        if GATHERED:  # a step runs through taps and channels alike
            k = step * BK + tl.arange(0, BK)
            k_valid = (k < depth) | FULL_STEPS
            tap = k // group_inputs
            channel = k - tap * group_inputs
            ih = top[:, None] + (tap // KW * DH)[None, :]
            iw = left[:, None] + (tap % KW * DW)[None, :]
            pixel = (n[:, None] * H + ih) * W + iw
            weight_row = k
        elif POINTWISE:
            channel = step * BK + tl.arange(0, BK)
            k_valid = (channel < group_inputs) | FULL_STEPS
            pixel = row[:, None]
            weight_row = channel
        else:  # a step is some channels of one tap
            tap = step // blocks
            channel = (step - tap * blocks) * BK + tl.arange(0, BK)
            k_valid = (channel < group_inputs) | FULL_STEPS
            ih = (top + tap // KW * DH)[:, None]
            iw = (left + tap % KW * DW)[:, None]
            pixel = (n[:, None] * H + ih) * W + iw
            weight_row = tap * group_inputs + channel
        inside = row_valid[:, None] & k_valid[None, :]
        if PADDED:
            inside = inside & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        in_channel = (group * group_inputs + channel)[None, :]
        x = tl.load(x_ptr + offset(pixel, x_pitch, WIDE) + in_channel, mask=inside, other=0.0)
        if TRANSFORMED:
            u = pre_activation(x.to(tl.float32), mean_ptr, scale_ptr, beta_ptr, in_channel, k_valid[None, :])
            if gate_ptr is not None and r_ptr is not None:  # of the join's operand y
                u *= tl.load(gate_ptr + n[:, None] * inputs + in_channel, mask=inside, other=0.0)
            if r_ptr is not None:
                r = tl.load(r_ptr + offset(pixel, r_pitch, WIDE) + in_channel, mask=inside, other=0.0).to(tl.float32)
                u += pre_activation(r, r_mean_ptr, r_scale_ptr, r_beta_ptr, in_channel, k_valid[None, :])
            z = activate(u, ACT, SLOPE)
            if gate_ptr is not None and r_ptr is None:
                z *= tl.load(gate_ptr + n[:, None] * inputs + in_channel, mask=inside, other=0.0)
            if PADDED:  # padding is zero *after* the activation; rows beyond the last are never stored
                z = tl.where(inside, z, 0.0)
            a = rounded(z, w_ptr.dtype.element_ty)
            if sum_ptr is not None:  # one tile of columns stores what all of them form
                first = tl.program_id(0) % column_tiles + tl.zeros((BM, 1), dtype=tl.int32) == 0
                tl.store(sum_ptr + offset(pixel, sum_pitch, WIDE) + in_channel, a, mask=inside & first)
        elif SAME_TYPE:
            a = x
        else:
            a = rounded(x.to(tl.float32), w_ptr.dtype.element_ty)
        w_offset = (group * group_outputs + column)[:, None] * (KH * KW * group_inputs) + weight_row[None, :]
        w = tl.load(w_ptr + w_offset, mask=column_valid[:, None] & k_valid[None, :], other=0.0)
        total = multiply_rows(a, w, total, PRECISION, TRANSFORMED or not SAME_TYPE, PART, SWAPPED)

    if SWAPPED:
        total = tl.trans(total)
    out_channel = group * group_outputs + column
    if bias_ptr is not None:
        total += tl.load(bias_ptr + out_channel, mask=column_valid, other=0.0)[None, :]
    y = representable(total, y_ptr.dtype.element_ty)
    stored = row_valid[:, None] & column_valid[None, :]
    tl.store(y_ptr + offset(row[:, None], y_pitch, WIDE) + out_channel[None, :], y.to(y_ptr.dtype.element_ty), mask=stored)
    if partial_ptr is not None:
        count = tl.minimum(rows - tile * BM, BM).to(tl.float32)
        store_partial_statistics(
            partial_ptr, (y,), (row_valid[:, None],), tile, row_tiles, count, out_channel, outputs, column_valid
        )


def conv_forward(
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    statistics: Wanted,
    out: Tensor | None = None,
    join: Join | None = None,
) -> tuple[Tensor, Mean, Tensor | None]:
    """(y, mean, var) as kernels/reference says, 2-D; x, the weight and ``dtype`` are fp32, bf16 or fp16.

    With ``join`` x, channels_last in ``dtype``, is written: the join's sum. Only where each pixel is read once: 1x1 kernels without
    stride, padding and groups.
    """
    kept = shortcut = None
    r_vectors = Transform()
    if join is not None:
        kept, shortcut, r_vectors = pixels(x), pixels(join.r), join.tr
        x, transform = join.y, join.ty._replace(act=join.act)
    source = pixels(x)
    batch, inputs, h, w = x.shape
    outputs, group_inputs, *kernel = weight.shape
    shape = (batch, outputs, *geometry.output_size((h, w), tuple(kernel)))
    y = empty_pixels(shape, dtype, x.device) if out is None else destination(out, dtype, out)
    group_outputs = outputs // geometry.groups
    gathered = is_gathered(group_inputs, kernel)
    depth = group_inputs * (kernel[0] * kernel[1] if gathered else 1)
    more = [given for given in (kept, shortcut) if given is not None]
    sizes = (source.pitch, y.pitch, *(given.pitch for given in more), group_inputs, group_outputs)
    heavy = is_heavy(transform, *sizes)
    tile = tiles.dense_forward(y.rows, group_outputs, depth, dtype.itemsize, gathered, heavy, join is not None)
    row_tiles = tiles.cdiv(y.rows, tile.m)
    partial = partial_statistics(row_tiles, outputs, x.device) if statistics else None
    mean, scale, beta, gate, bias = vectors(transform.mean, transform.scale, transform.beta, transform.gate, bias)
    launch(
        _dense_forward_kernel, (row_tiles * geometry.groups * tiles.cdiv(group_outputs, tile.n), 1),
        source.tensor, packed_weight(weight, dtype), bias, y.tensor, mean, scale, beta, gate,
        None if shortcut is None else shortcut.tensor, *vectors(r_vectors.mean, r_vectors.scale, r_vectors.beta),
        None if kept is None else kept.tensor, partial,
        source.pitch, 0 if shortcut is None else shortcut.pitch, 0 if kept is None else kept.pitch,
        y.pitch, y.rows, row_tiles, h, w, *shape[2:], inputs, outputs, group_inputs, group_outputs,
        **activation_constants(transform.act), **geometry_constants(geometry, kernel),
        GATHERED=gathered, PADDED=is_padded(geometry), WIDE=any(given.wide for given in (source, y, *more)), PRECISION=precision_of(dtype),
        FULL_ROWS=y.rows % tile.m == 0, FULL_COLUMNS=group_outputs % tile.n == 0, FULL_STEPS=depth % tile.k == 0,
        GROUPS=geometry.groups, UNIT=unit_of(*sizes), BM=tile.m, BN=tile.n, BK=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    result = y.tensor if out is None or y.tensor is out else out.copy_(y.tensor)
    return result, *merge_statistics(None if partial is None else Unmerged(partial, y.rows, tile.m), statistics)
