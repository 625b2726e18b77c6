"""What each of two gloo processes does in the test of a device whose kernels are proved first: train, and write what ran when."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import torch
from planted_kernels import KERNELS as PLANTED
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import bnrestructure
from bnrestructure.capture import probation
from bnrestructure.kernels import registry

__all__ = ["WORLD", "train_on_probation"]

WORLD = 2


def _net() -> nn.Module:
    first = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    second = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Conv2d(16, 8, 1)).to(memory_format=torch.channels_last)


def train_on_probation(rank: int, folder: str) -> None:
    """Under DDP, beside a twin that is not restructured; after each turn of steps, how many convolutions the kernels have answered."""
    os.environ |= {"BNRESTRUCTURE_CACHE": f"{folder}/cache-{rank}", "PYTHONPATH": str(Path(__file__).parent), "BNR_PLANTED": ""}
    torch.set_num_threads(1)
    registry._PROVED_FIRST = {"cpu"}
    registry._DEVICES["cpu"] = "planted_kernels"
    probation._MARGIN = 1e9  # the turns of a net this small say nothing
    registry.forget_answers()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    twin = _net()
    model = bnrestructure.restructure(copy.deepcopy(twin))
    both = [(DistributedDataParallel(m), torch.optim.SGD(m.parameters(), 0.01)) for m in (twin, model)]
    torch.manual_seed(rank)
    answered = []
    for turn in range(8):
        for _ in range(6):
            x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
            for wrapped, optimizer in both:
                optimizer.zero_grad()
                wrapped(x).square().mean().backward()
                optimizer.step()
        kernels = registry.proved("cpu")
        if turn == 0 and kernels is not None:
            kernels.wait()
        answered.append(PLANTED.answered.get("ConvForward", 0))
    for theirs, ours in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    Path(folder, f"{rank}.json").write_text(json.dumps({"answered": answered, "plan": str(bnrestructure.explain(model))}))
    distributed.barrier()
    distributed.destroy_process_group()
