"""The fused convolution's input gradient: an implicit product, [input pixels, taps * C_out] by [taps * C_out, C_in].

The prologue forms dY = s * P + a * (y - mean) + b; the epilogue applies the activation's mask and the scale, takes
the sums SP and SPX, and stores or accumulates in place; behind a residual join it finishes the gradient of the sum.
With strides an input pixel meets only the taps that are congruent to it, so each residue class of pixels is a launch
of its own over exactly its taps: no product is formed only to be thrown away.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry, Join, Transform
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activation_constants
from bnrestructure.kernels.cuda.edges import (
    EdgePixels,
    input_gradient,
    is_input_needed,
    load_gate,
    load_raw,
    load_vector,
    output_gradient,
    store_gradient,
    store_join_gradient,
    store_sums,
)
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import destination, packed_weight, pixels, vectors
from bnrestructure.kernels.cuda.merge import partial_sums
from bnrestructure.kernels.cuda.precision import beside, in_units, is_swapped, multiply_rows, restored_gradient, rounded_gradient
from bnrestructure.kernels.cuda.problem import is_heavy, precision_of, unit_of
from bnrestructure.kernels.cuda.programs import tile_and_group
from bnrestructure.kernels.cuda.sums import Sums

__all__ = ["InputGradient", "dgrad"]


class InputGradient(NamedTuple):
    """dx [N, C, H, W] in x's dtype; SP, SPX and, behind a join, SPR, [C] fp32 or None; the gate's gradient [N, C] fp32 or None."""

    dx: Tensor
    sum_p: Tensor | None
    sum_px: Tensor | None
    gate: Tensor | None
    sum_pr: Tensor | None = None


class _Class(NamedTuple):
    """Along one dimension, the input positions ``first + i * stride`` (``size`` of them) and the taps that they meet:
    ``tap + j * tap_step`` for j < taps. Position i meets tap j at output i + shift + j * shift_step."""

    first: int
    size: int
    tap: int
    tap_step: int
    taps: int
    shift: int
    shift_step: int


def _classes(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[_Class]:
    """The residue classes of one dimension's positions that are not empty."""
    step = stride // gcd(stride, dilation)  # taps this far apart meet the same positions
    found = []
    for first in range(min(stride, size)):
        members = (size - first + stride - 1) // stride
        meeting = [k for k in range(kernel) if (first + padding - k * dilation) % stride == 0]
        tap = meeting[0] if meeting else 0
        shift = (first + padding - tap * dilation) // stride
        found.append(_Class(first, members, tap, step, len(meeting), shift, -(step * dilation) // stride))
    return found


# Compiled once for all sizes and residue classes: only pitches and numbers of channels are worth specialising on.
_SIZES = (
    "rows", "first_tile", "all_tiles", "H", "W", "OH", "OW", "CH", "CW", "first_h", "first_w", "tap_h", "tap_w",
    "tap_step_h", "tap_step_w", "taps_h", "taps_w", "shift_h", "shift_w", "shift_step_h", "shift_step_w",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _dense_dgrad_kernel(
    p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, w_ptr, x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr,
    r_ptr, r_mean_ptr, r_scale_ptr, r_beta_ptr, dx_ptr, partial_ptr, gate_partial_ptr,
    p_pitch, y_pitch, x_pitch, r_pitch, dx_pitch, rows, first_tile, all_tiles, H, W, OH, OW, inputs, group_inputs, group_outputs,
    CH, CW, first_h, first_w, tap_h, tap_w, tap_step_h, tap_step_w, taps_h, taps_w,
    shift_h, shift_w, shift_step_h, shift_step_w,
    ACT: tl.constexpr, SLOPE: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ACCUMULATE: tl.constexpr, BY_IMAGE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    FULL_ROWS: tl.constexpr, FULL_COLUMNS: tl.constexpr, FULL_STEPS: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    p_pitch, y_pitch = in_units(p_pitch, UNIT), in_units(y_pitch, UNIT)
    x_pitch, r_pitch, dx_pitch = in_units(x_pitch, UNIT), in_units(r_pitch, UNIT), in_units(dx_pitch, UNIT)
    inputs = in_units(inputs, UNIT)
    group_inputs, group_outputs = in_units(group_inputs, UNIT), in_units(group_outputs, UNIT)
    column_tiles = tl.cdiv(group_inputs, BN)
    tile, group = tile_and_group(column_tiles, GROUPS)
    column = (tl.program_id(0) % column_tiles) * BN + tl.arange(0, BN)
    column_valid = (column < group_inputs) | FULL_COLUMNS
    POINTWISE: tl.constexpr = KH * KW * SH * SW == 1 and not (PADDED or BY_IMAGE)  # an output pixel is the input pixel of the same number
    image_tiles = tl.cdiv(CH * CW, BM)
    if BY_IMAGE:  # no tile spans two images, so that a tile's sum belongs to one of them
        image = tile // image_tiles
        position = (tile - image * image_tiles) * BM + tl.arange(0, BM)
        row_valid = position < CH * CW
        n = tl.zeros((BM,), dtype=tl.int32) + image
    else:
        row = tile * BM + tl.arange(0, BM)
        row_valid = (row < rows) | FULL_ROWS
        n = row // (CH * CW)
        position = row - n * (CH * CW)
    ch = position // CW
    cw = position - ch * CW

    blocks = tl.cdiv(group_outputs, BK)
    SWAPPED: tl.constexpr = is_swapped(BN)
    AXIS: tl.constexpr = 1 if SWAPPED else 0
    NEEDED: tl.constexpr = r_ptr is not None or is_input_needed(mean_ptr, gate_ptr, ACT)
    if POINTWISE:  # noqa: SIM108  (Triton's compiler decides a statement, not an expression, before it looks inside)
        pixel = row
    else:
        pixel = (n * H + ch * SH + first_h) * W + cw * SW + first_w
    in_channel = group * group_inputs + column
    # What the epilogue reads is on its way meanwhile. And what is loaded behind the product would lay out all that it meets, sums too.
    x = load_raw(x_ptr, x_pitch, pixel, in_channel, row_valid, column_valid, WIDE, AXIS) if NEEDED else None
    mean = load_vector(mean_ptr, in_channel, column_valid, AXIS)
    scale = load_vector(scale_ptr, in_channel, column_valid, AXIS)
    beta = load_vector(beta_ptr, in_channel, column_valid, AXIS)
    if r_ptr is not None:
        r = load_raw(r_ptr, r_pitch, pixel, in_channel, row_valid, column_valid, WIDE, AXIS)
        r_mean = load_vector(r_mean_ptr, in_channel, column_valid, AXIS)
        r_scale = load_vector(r_scale_ptr, in_channel, column_valid, AXIS)
        r_beta = load_vector(r_beta_ptr, in_channel, column_valid, AXIS)
        gate = load_gate(gate_ptr, n, inputs, in_channel, row_valid, column_valid, AXIS)
    total = tl.zeros((BN, BM) if SWAPPED else (BM, BN), dtype=tl.float32)
    for step in range(0, taps_h * taps_w * blocks):
        if POINTWISE:
            channel = step * BK + tl.arange(0, BK)
            read = row[:, None]
            weight_tap = 0
        else:
            tap = step // blocks
            j_h = tap // tl.maximum(taps_w, 1)  # without a tap there is no step, but the compiler may divide before it asks
            j_w = tap - j_h * taps_w
            channel = (step - tap * blocks) * BK + tl.arange(0, BK)
            oh = ch + shift_h + j_h * shift_step_h
            ow = cw + shift_w + j_w * shift_step_w
            read = ((n * OH + oh) * OW + ow)[:, None]
            weight_tap = (tap_h + j_h * tap_step_h) * KW + tap_w + j_w * tap_step_w
        k_valid = (channel < group_outputs) | FULL_STEPS
        inside = row_valid[:, None] & k_valid[None, :]
        if PADDED:
            inside = inside & ((oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW))[:, None]
        out_channel = (group * group_outputs + channel)[None, :]
        d = output_gradient(
            p_ptr, y_ptr, s_ptr, a_ptr, b_ptr, y_mean_ptr, rate, p_pitch, y_pitch, read, out_channel, inside, k_valid[None, :], WIDE
        )
        if PADDED and a_ptr is not None:  # outside the output dY is 0, not b
            d = tl.where(inside, d, 0.0)
        w_offset = ((group * group_outputs + channel)[None, :] * (KH * KW) + weight_tap) * group_inputs + column[:, None]
        w = tl.load(w_ptr + w_offset, mask=column_valid[:, None] & k_valid[None, :], other=0.0)
        total = multiply_rows(rounded_gradient(d, a_ptr, w_ptr.dtype.element_ty), w, total, PRECISION, True, PART, SWAPPED)

    total = restored_gradient(total, a_ptr, w_ptr.dtype.element_ty)
    if x is not None:
        x = beside(x.to(tl.float32), total)
    if r_ptr is not None:  # x is the join's operand y
        if gate is not None:
            gate = beside(gate, total)
        store_join_gradient(
            total, x, mean, scale, beta, gate, beside(r.to(tl.float32), total), r_mean, r_scale, r_beta, dx_ptr, partial_ptr, dx_pitch,
            pixel, in_channel, row_valid, column_valid, first_tile + tile, all_tiles, inputs, ACT, SLOPE, ACCUMULATE, WIDE, AXIS,
        )  # fmt: skip
    else:
        g, first, second = input_gradient(
            total, x, mean, scale, beta, gate_ptr, in_channel, row_valid, column_valid, tile // image_tiles, inputs, ACT, SLOPE, AXIS
        )
        store_sums(
            first, second, mean_ptr, gate_ptr, partial_ptr, gate_partial_ptr, in_channel, column_valid,
            first_tile + tile, all_tiles, inputs, AXIS,
        )  # fmt: skip
        store_gradient(g, dx_ptr, dx_pitch, pixel, in_channel, row_valid, column_valid, ACCUMULATE, WIDE, AXIS=AXIS)


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
    join: Join | None = None,
) -> InputGradient:
    """The gradient at x and what its epilogue sums, which is due in ``sums``. A gate needs stride 1 (see limits.py).

    ``accumulate`` is added to in place and returned as dx; one that cannot be addressed, in a step of its own. With ``join``, of which x
    is the sum, dx is what its operands share; the transform is the identity then.
    """
    batch, inputs, h, w = x.shape
    outputs, group_inputs, kh, kw = weight.shape
    shortcut, r_vectors = None, Transform()
    if join is not None:
        x, transform = join.y, join.ty._replace(act=join.act)
        shortcut, r_vectors = pixels(join.r), join.tr
    source = pixels(x)
    dx = destination(x, x.dtype, accumulate)
    if join is not None and accumulate is not None and dx.tensor is not accumulate:  # the mask comes after the sum
        accumulate = dx.tensor.copy_(accumulate)
    in_place = accumulate is not None and dx.tensor is accumulate
    gated = transform.gate is not None and join is None  # a join's gate takes its gradient elsewhere
    rows_of = [_classes(h, kh, geometry.stride[0], geometry.padding[0], geometry.dilation[0]),
               _classes(w, kw, geometry.stride[1], geometry.padding[1], geometry.dilation[1])]  # fmt: skip
    # What meets no tap gains nothing: three quarters of the pixels before a 1x1 kernel of stride 2. A join's mask is for all of them.
    idle = in_place and join is None
    pairs = [(i, j) for i in rows_of[0] for j in rows_of[1] if i.taps * j.taps or not idle]
    group_outputs = outputs // geometry.groups
    r_pitch = 0 if shortcut is None else shortcut.pitch
    sizes = (*edge.pitches, source.pitch, r_pitch, dx.pitch, group_inputs, group_outputs)
    heavy = is_heavy(transform, *sizes)
    class_rows = dx.rows // (len(rows_of[0]) * len(rows_of[1]))
    tile = tiles.dense_dgrad(class_rows, group_inputs, group_outputs, dtype.itemsize, heavy, join is not None)
    row_tiles = [
        batch * tiles.cdiv(i.size * j.size, tile.m) if gated else tiles.cdiv(batch * i.size * j.size, tile.m)
        for i, j in pairs
    ]  # fmt: skip
    all_tiles = sum(row_tiles)
    has_sums = (transform.mean is not None or join is not None) and not gated
    has_px = transform.gives_sums
    planes = 1 + has_px + (r_vectors.mean is not None)
    partial = partial_sums(planes, all_tiles, inputs, x.device) if has_sums else None
    gate_partial = partial_sums(1, all_tiles, inputs, x.device) if gated else None
    mean, scale, beta, gate = vectors(transform.mean, transform.scale, transform.beta, transform.gate)
    weight = packed_weight(weight, dtype)
    first_tile = 0
    for count, (i, j) in zip(row_tiles, pairs, strict=True):
        launch(
            _dense_dgrad_kernel, (count * geometry.groups * tiles.cdiv(group_inputs, tile.n), 1),
            *edge.pointers, weight, source.tensor, mean, scale, beta, gate,
            None if shortcut is None else shortcut.tensor, *vectors(r_vectors.mean, r_vectors.scale, r_vectors.beta),
            dx.tensor, partial, gate_partial,
            *edge.pitches, source.pitch, r_pitch, dx.pitch, batch * i.size * j.size, first_tile, all_tiles,
            h, w, *edge.size, inputs, group_inputs, group_outputs,
            i.size, j.size, i.first, j.first, i.tap, j.tap, i.tap_step, j.tap_step, i.taps, j.taps,
            i.shift, j.shift, i.shift_step, j.shift_step,
            **activation_constants(transform.act), SH=geometry.stride[0], SW=geometry.stride[1], KH=kh, KW=kw,
            ACCUMULATE=in_place, BY_IMAGE=gated, PADDED=_leaves(i, edge.size[0]) or _leaves(j, edge.size[1]),
            WIDE=edge.wide or source.wide or dx.wide or (shortcut is not None and shortcut.wide), PRECISION=precision_of(dtype),
            FULL_ROWS=not gated and batch * i.size * j.size % tile.m == 0, FULL_COLUMNS=group_inputs % tile.n == 0,
            FULL_STEPS=group_outputs % tile.k == 0, GROUPS=geometry.groups, UNIT=unit_of(*sizes),
            BM=tile.m, BN=tile.n, BK=tile.k, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        first_tile += count
    totals = None if partial is None else sums.of(partial)
    dgate = None if gate_partial is None else sums.of(gate_partial.view(batch, -1, inputs))
    result = dx.tensor if accumulate is None or in_place else accumulate.add_(dx.tensor)
    if totals is None:
        return InputGradient(result, None, None, dgate)
    sum_pr = None if r_vectors.mean is None else totals[-1]
    return InputGradient(result, totals[0], totals[1] if has_px else None, dgate, sum_pr)


def _leaves(c: _Class, size: int) -> bool:
    """Whether some tap of the class lies outside an output of this size for some position."""
    ends = [c.shift + j * c.shift_step for j in (0, c.taps - 1)]
    return c.taps > 0 and (min(ends) < 0 or max(ends) + c.size > size)
