"""Batch statistics of a tensor and their backward; the per-channel finalize, forward and backward, one launch each."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.kernels.calls import FinalizeBackward, FinalizeForward, FinalizeGradients, FinalizeResult, StatisticsBackward
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.cuda.layout import destination, pixels, vectors
from bnrestructure.kernels.cuda.merge import merge_statistics, merged_tiles, partial_statistics, store_partial_statistics
from bnrestructure.kernels.cuda.precision import dithered, in_units, offset, rounded
from bnrestructure.kernels.cuda.problem import unit_of
from bnrestructure.kernels.cuda.programs import tile_and_channels
from bnrestructure.kernels.unmerged import Mean, Unmerged, Wanted

__all__ = ["finalize_backward", "finalize_forward", "statistics_backward", "statistics_forward"]

_BLOCK = 256


@triton.jit(do_not_specialize=("rows", "row_tiles"))
def _statistics_kernel(
    x_ptr, copy_ptr, partial_ptr, pitch, copy_pitch, rows, row_tiles, channels,
    WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pitch, copy_pitch, channels = in_units(pitch, UNIT), in_units(copy_pitch, UNIT), in_units(channels, UNIT)
    tile, channel = tile_and_channels(channels, BC)
    row = tile * BR + tl.arange(0, BR)
    valid = channel < channels
    inside = (row < rows)[:, None] & valid[None, :]
    x = tl.load(x_ptr + offset(row[:, None], pitch, WIDE) + channel[None, :], mask=inside, other=0.0)
    if copy_ptr is not None:
        tl.store(copy_ptr + offset(row[:, None], copy_pitch, WIDE) + channel[None, :], x, mask=inside)
    count = tl.minimum(rows - tile * BR, BR).to(tl.float32)
    store_partial_statistics(partial_ptr, (x.to(tl.float32),), (inside,), tile, row_tiles, count, channel, channels, valid)


def statistics_forward(x: Tensor, out: Tensor | None = None, wanted: Wanted = True) -> tuple[Mean, Tensor | None]:
    """Mean and biased variance of x [N, C, H, W], each [C] fp32, from centred sums; x is copied to ``out`` on the way."""
    source, copy = pixels(x), None if out is None else destination(x, x.dtype, out)
    pitches = source.pitch, 0 if copy is None else copy.pitch
    channels = x.shape[1]
    tile = tiles.statistics(channels)
    row_tiles = tiles.cdiv(source.rows, tile.rows)
    partial = partial_statistics(row_tiles, channels, x.device)
    launch(
        _statistics_kernel, (row_tiles * tiles.cdiv(channels, tile.channels),),
        source.tensor, None if copy is None else copy.tensor, partial, *pitches, source.rows, row_tiles, channels,
        WIDE=source.wide or (copy is not None and copy.wide), UNIT=unit_of(*pitches, channels),
        BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    if copy is not None and out is not None and copy.tensor is not out:  # no kernel can address it
        out.copy_(copy.tensor)
    return merge_statistics(Unmerged(partial, source.rows, tile.rows), wanted)


@triton.jit(do_not_specialize=("rows",))
def _statistics_backward_kernel(
    x_ptr, mean_ptr, a_ptr, b_ptr, rate, dx_ptr, x_pitch, dx_pitch, rows, channels,
    ACCUMULATE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_pitch, dx_pitch, channels = in_units(x_pitch, UNIT), in_units(dx_pitch, UNIT), in_units(channels, UNIT)
    tile, columns = tile_and_channels(channels, BC)
    row = (tile * BR + tl.arange(0, BR))[:, None]
    channel = columns[None, :]
    valid = channel < channels
    inside = (row < rows) & valid
    x = tl.load(x_ptr + offset(row, x_pitch, WIDE) + channel, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)
    a = tl.load(a_ptr + channel, mask=valid, other=0.0)
    b = tl.load(b_ptr + channel, mask=valid, other=0.0)
    if rate is not None:
        a *= 2.0 * rate
        b *= rate
    d = tl.fma(x - mean, a, tl.broadcast_to(b, (BR, BC)))
    place = dx_ptr + offset(row, dx_pitch, WIDE) + channel
    if ACCUMULATE:
        d += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, dithered(d, row, dx_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(place, rounded(d, dx_ptr.dtype.element_ty), mask=inside)


def statistics_backward(call: StatisticsBackward) -> Tensor:
    """``a * (x - mean) + b``, in x's dtype, or added in place to ``accumulate``, [N, C, H, W]."""
    x, accumulate = call.x, call.accumulate
    source = pixels(x)
    dx = destination(x, x.dtype, accumulate)
    in_place = accumulate is not None and dx.tensor is accumulate
    channels = x.shape[1]
    tile = tiles.sweep(channels)
    launch(
        _statistics_backward_kernel, (tiles.cdiv(source.rows, tile.rows) * tiles.cdiv(channels, tile.channels),),
        source.tensor, *vectors(call.mean, call.a, call.b), None if call.count is None else 1.0 / call.count,
        dx.tensor, source.pitch, dx.pitch, source.rows, channels,
        ACCUMULATE=in_place, WIDE=source.wide or dx.wide,
        UNIT=unit_of(source.pitch, dx.pitch, channels), BR=tile.rows, BC=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return dx.tensor if accumulate is None or in_place else accumulate.add_(dx.tensor)


@triton.jit(do_not_specialize=("first", "tiles", "rows", "unit"))
def _finalize_kernel(
    mean_ptr, var_ptr, behind_mean_ptr, behind_var_ptr, whole_ptr, partial_ptr, tile_count_ptr, count_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, batches_ptr, out_ptr, first, channels, tiles, rows, unit, correction, momentum, eps,
    CUMULATIVE: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    end = (tl.program_id(0) + 1) * BLOCK
    channel = end - BLOCK + tl.arange(0, BLOCK)
    valid = channel < channels
    before = valid & (channel < first)
    mean = tl.load(mean_ptr + channel, mask=before, other=0.0)
    var = tl.load(var_ptr + channel, mask=before, other=1.0)
    if behind_mean_ptr is not None:
        behind = valid & (channel >= first)
        last = channel - first
        if partial_ptr is None:
            last_mean = tl.load(behind_mean_ptr + last, mask=behind, other=0.0)
            last_var = tl.load(behind_var_ptr + last, mask=behind, other=1.0)
        else:
            to_merge = tl.where(end > first, tiles, 0)  # none for channels that are all known
            origin, shift, m2, total = merged_tiles(
                partial_ptr, tile_count_ptr, 0, to_merge, tiles, channels - first, rows, unit, last, behind, BT, BLOCK
            )
            last_mean, last_var = origin + shift, m2 / total
            tl.store(behind_mean_ptr + last, last_mean, mask=behind)
            tl.store(behind_var_ptr + last, last_var, mask=behind)
        mean, var = tl.where(behind, last_mean, mean), tl.where(behind, last_var, var)
    if whole_ptr is not None:
        tl.store(whole_ptr + channel, mean, mask=valid)
        tl.store(whole_ptr + channels + channel, var, mask=valid)
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    scale = rstd
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32) * rstd
    beta = tl.zeros((BLOCK,), dtype=tl.float32)
    if bias_ptr is not None:
        beta = tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + channel, rstd, mask=valid)
    tl.store(out_ptr + channels + channel, scale, mask=valid)
    tl.store(out_ptr + 2 * channels + channel, beta, mask=valid)
    if count_ptr is not None:
        count = tl.load(count_ptr).to(tl.float32)
        correction = count / (count - 1.0)
    if CUMULATIVE:  # the counter was counted up before: no program may write what another one reads
        momentum = 1.0 / tl.load(batches_ptr).to(tl.float32)
    elif batches_ptr is not None and tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + channel, mask=valid, other=0.0).to(tl.float32)
        new = old * (1.0 - momentum) + mean * momentum
        tl.store(running_mean_ptr + channel, rounded(new, running_mean_ptr.dtype.element_ty), mask=valid)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + channel, mask=valid, other=0.0).to(tl.float32)
        new = old * (1.0 - momentum) + var * correction * momentum
        tl.store(running_var_ptr + channel, rounded(new, running_var_ptr.dtype.element_ty), mask=valid)


def finalize_forward(call: FinalizeForward) -> FinalizeResult:
    """See the call; each vector is [C] fp32. Updates the running statistics and the counter in place.

    A ``count`` that is a tensor is read on the device, and so is the counter: the host does not wait for them.
    """
    mean, count, batches, momentum = call.mean, call.count, call.batches, call.momentum
    first, behind = mean.shape[0], (None, None) if call.behind is None else call.behind
    channels = first + (0 if behind[0] is None else behind[0].shape[0])
    partial = counts = None
    tile, to_merge, rows, unit = tiles.SweepTile(1, _BLOCK, 4), 0, 0, 0
    if call.unmerged is not None:
        first, behind = (0, (mean, call.var)) if call.behind is None else (first, behind)
        partial, rows, unit, counts = call.unmerged
        to_merge = partial.shape[1]
        tile, _ = tiles.merge(to_merge, channels - first)
    out = torch.empty(3 if call.behind is None else 5, channels, dtype=torch.float32, device=mean.device)
    statistics, parameters = vectors(mean, call.var, *behind), (_contiguous(call.weight), _contiguous(call.bias))
    cumulative = momentum is None and batches is not None
    if batches is not None and (cumulative or batches.dtype is not torch.int64 or batches.numel() != 1):
        batches.add_(1)
        batches = batches if cumulative else None
    on_device, correction = None, math.inf  # a single value per channel has no unbiased variance
    if isinstance(count, Tensor):
        on_device = count.to(mean.device)
    elif count > 1:
        correction = count / (count - 1)
    launch(
        _finalize_kernel, (tiles.cdiv(channels, tile.channels),),
        *statistics, None if call.behind is None else out[3:], partial, counts, on_device, *parameters,
        call.running_mean, call.running_var, batches, out, first, channels, to_merge, rows, unit, correction, float(momentum or 0),
        float(call.eps), CUMULATIVE=cumulative, BT=tile.rows, BLOCK=tile.channels, warps=tile.warps,
    )  # fmt: skip
    return FinalizeResult(*out.unbind(), *(() if call.behind is not None else (mean, call.var)))


@triton.jit
def _finalize_backward_kernel(
    dscale_ptr, dbeta_ptr, rstd_ptr, scale_ptr, dmean_ptr, dvar_ptr, out_ptr, channels, BLOCK: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < channels
    dscale = tl.load(dscale_ptr + channel, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + channel, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + channel, mask=valid, other=0.0)
    mean = -scale * tl.load(dbeta_ptr + channel, mask=valid, other=0.0)
    var = dscale * scale * rstd * rstd * -0.5
    if dmean_ptr is not None:
        mean += tl.load(dmean_ptr + channel, mask=valid, other=0.0)
    if dvar_ptr is not None:
        var += tl.load(dvar_ptr + channel, mask=valid, other=0.0)
    tl.store(out_ptr + channel, mean, mask=valid)
    tl.store(out_ptr + channels + channel, var, mask=valid)
    tl.store(out_ptr + 2 * channels + channel, dscale * rstd, mask=valid)


def finalize_backward(call: FinalizeBackward) -> FinalizeGradients:
    """See the call; each vector is [C] fp32."""
    channels = call.rstd.shape[0]
    out = torch.empty(3, channels, dtype=torch.float32, device=call.rstd.device)
    launch(
        _finalize_backward_kernel, (tiles.cdiv(channels, _BLOCK),),
        *vectors(call.dscale, call.dbeta, call.rstd, call.scale, call.dmean, call.dvar), out, channels, BLOCK=_BLOCK, warps=4,
    )  # fmt: skip
    return FinalizeGradients(*out.unbind())


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().contiguous()
