"""SyncBatchNorm's step between the halves: the statistics of all ranks merged with Chan's formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from bnrestructure.core.edges import values_per_channel

__all__ = ["SynchroniseOutputs", "synchronise"]


class SynchroniseOutputs(NamedTuple):
    """mean and var, each [C], over all ranks; size is the number of values per channel, or, of a single rank, the size of its tensor."""

    mean: Tensor
    var: Tensor
    size: torch.Size | Tensor


def synchronise(
    mean: Tensor, var: Tensor, size: torch.Size | Tensor, process_group: Any = None
) -> SynchroniseOutputs:
    """(mean, var, number of values per channel) over all ranks of ``process_group`` (None: the default group).

    Returns its arguments where there is a single rank, as SyncBatchNorm does. Ranks may hold batches of different sizes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return SynchroniseOutputs(mean, var, size)
    group = dist.group.WORLD if process_group is None else process_group
    if dist.get_world_size(group) == 1:
        return SynchroniseOutputs(mean, var, size)
    count = values_per_channel(size) if isinstance(size, torch.Size) else size
    return SynchroniseOutputs(*_Synchronise.apply(mean, var, count, group))


class _Synchronise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, count: Any, group: Any) -> Any:
        # A number becomes a tensor where it is needed: a copy from the host would wait for the device, and no CUDA graph could hold it.
        own_count = count.to(mean.dtype).reshape(1) if isinstance(count, Tensor) else mean.new_full((1,), count)
        own = torch.cat([mean, var, own_count])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        channels = mean.numel()
        rows = torch.stack(gathered)
        means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        total = counts.sum()
        weight = counts / total
        merged_mean = (weight * means).sum(0)
        merged_var = (weight * (variances + (means - merged_mean).square())).sum(0)
        ctx.group = group
        ctx.save_for_backward(mean, merged_mean, own[-1] / total)
        ctx.mark_non_differentiable(total)
        return merged_mean, merged_var, total

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor, _: Any) -> Any:
        mean, merged_mean, weight = ctx.saved_tensors
        gradients = torch.cat([dmean, dvar])
        dist.all_reduce(gradients, group=ctx.group)
        dmean, dvar = gradients.chunk(2)
        return weight * (dmean + 2 * dvar * (mean - merged_mean)), weight * dvar, None, None
