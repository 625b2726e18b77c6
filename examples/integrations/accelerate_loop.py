"""
Accelerate
==========

Restructure before ``prepare``: what it wraps (DDP, FSDP, autocast) then wraps the restructured model. With ``mixed_precision``
it also replaces the forward of the model object itself, so the parts of the network are rewritten one by one and nothing is
fused across them: to have it in one piece, put ``torch.autocast`` into your loop instead.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from tiny import build, loader
from torch.nn.functional import cross_entropy

import bnrestructure


def main() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = bnrestructure.restructure(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader(8))
    for images, labels in data:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
    accelerator.print(bnrestructure.explain(accelerator.unwrap_model(model)))


if __name__ == "__main__":
    main()
