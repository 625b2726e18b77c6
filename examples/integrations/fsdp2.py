"""
FSDP2: fully_shard
==================

Restructure first, shard afterwards; FSDP wants the parameters contiguous, the images stay channels_last. A unit that FSDP wraps
manages its own parameters and is a boundary: nothing is fused across, everything inside is.

.. code-block:: sh

    torchrun --nproc-per-node 2 examples/integrations/fsdp2.py

Started without torchrun it is a group of one.
"""

from __future__ import annotations

import gc
import os

import torch
from tiny import batches, build
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import bnrestructure


def main() -> None:
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29532")):
        os.environ.setdefault(name, alone)
    distributed.init_process_group("gloo")
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    model = bnrestructure.restructure(build().to(memory_format=torch.contiguous_format))
    for block in (model[1], model[2]):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in batches(4 * ranks)[rank::ranks]:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        print(f"{ranks} rank(s), loss {loss.item():.3f}")
        print(bnrestructure.explain(model))
    # Gloo's threads end with the last tensor that they were given: before Python does, or PyTorch may abort at the very end.
    del model, block, optimizer, loss
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
