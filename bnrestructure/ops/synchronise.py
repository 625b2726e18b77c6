"""SyncBatchNorm's step between the halves: the statistics of all ranks merged with Chan's formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["synchronise"]


def synchronise(
    mean: Tensor, var: Tensor, size: torch.Size | Tensor, process_group: Any = None
) -> tuple[Tensor, Tensor, torch.Size | Tensor]:
    """(mean, var, number of values per channel) over all ranks of ``process_group`` (None: the default group).

    Returns its arguments where there is a single rank, as SyncBatchNorm does. Ranks may hold batches of different sizes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return mean, var, size
    group = dist.group.WORLD if process_group is None else process_group
    if dist.get_world_size(group) == 1:
        return mean, var, size
    count = size.numel() // size[1] if isinstance(size, torch.Size) else size
    return _Synchronise.apply(mean, var, count, group)


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
