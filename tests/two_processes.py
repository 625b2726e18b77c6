"""What each of two gloo processes does in the distributed tests: train a restructured model on half of a batch, save what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_models import build
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import bnrestructure

__all__ = ["batch_for", "loss_of", "train_half"]

WORLD = 2


def batch_for(name: str) -> Tensor:
    """The joint batch, its halves of equal size."""
    return torch.randn(8, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def loss_of(outputs: Tensor) -> Tensor:
    """A mean over the batch, so that DDP's average over ranks is the joint batch's loss."""
    return (outputs.flatten(1) * torch.arange(outputs[0].numel(), dtype=outputs.dtype).cos()).sum(1).square().mean()


def train_half(rank: int, kind: str, name: str, folder: str) -> None:
    """Two SGD steps on this rank's half; parameters and buffers are written to ``folder``.

    ``kind``: ``ddp`` (restructured inside DDP), ``eager`` (plain DDP), ``sync`` (SyncBatchNorm, restructured; DDP refuses those on a CPU,
    so the gradients are summed here), ``sync-ragged`` (the same with ranks of different batch size). ``eager-float``, ``ddp-float``
    and ``sync-float`` are in float32 with the kernels that users get.
    """
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        single = kind.endswith("float")
        model = build(name, torch.float32 if single else torch.float64)
        if kind.startswith("sync"):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if not kind.startswith("eager"):
            model = bnrestructure.restructure(model, backend="auto" if single else "reference")
        x = batch_for(name).to(next(model.parameters()).dtype)
        x = x.chunk(WORLD)[rank] if kind != "sync-ragged" else (x[:3] if rank == 0 else x[3:])
        wrapped: Any = model if kind.startswith("sync") else DistributedDataParallel(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimiser.zero_grad()
            loss = loss_of(wrapped(x))
            if kind.startswith("sync"):
                loss = loss * (len(x) / 8)
            loss.backward()
            if kind.startswith("sync"):
                for p in model.parameters():
                    distributed.all_reduce(p.grad)
            optimiser.step()
        torch.save(model.state_dict(), Path(folder) / f"{kind}-{rank}.pt")
    finally:
        distributed.destroy_process_group()
