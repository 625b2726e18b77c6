"""
DistributedDataParallel
=======================

Restructure before or after wrapping; gradients are reduced as they are made, as in eager. With SyncBatchNorm the statistics of
all ranks are merged between the two halves.

.. code-block:: sh

    torchrun --nproc-per-node 2 examples/integrations/ddp.py

Started without torchrun it is a group of one.
"""

from __future__ import annotations

import os

import torch
from tiny import batches, build
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import bnrestructure


def main() -> None:
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29531")):
        os.environ.setdefault(name, alone)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    model = build()
    bnrestructure.restructure(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for images, labels in batches(4 * ranks)[rank::ranks]:  # each rank its own
        loss = cross_entropy(wrapped(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    everything = sum(p.detach().double().sum() for p in model.parameters())
    print(f"rank {rank} of {ranks}: loss {loss.item():.3f}, parameters add up to {everything:.9f}")
    if rank == 0:
        print(bnrestructure.explain(model))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
