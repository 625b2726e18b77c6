"""
Gradient accumulation
=====================

Gradients of several small batches are added up before a step. Batch norm's statistics are those of each small batch, as in
eager; with the memory that restructuring saves, the batches can be larger and fewer.
"""

from __future__ import annotations

import torch
from tiny import batches, build
from torch.nn.functional import cross_entropy

import bnrestructure

ACCUMULATED = 4


def main() -> None:
    model, plain = bnrestructure.restructure(build()), build()
    for network in (model, plain):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for i, (images, labels) in enumerate(batches(2 * ACCUMULATED), start=1):
            (cross_entropy(network(images), labels) / ACCUMULATED).backward()
            if i % ACCUMULATED == 0:
                optimizer.step()
                optimizer.zero_grad()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    apart = max(float((p - q).detach().norm() / q.detach().norm().clamp_min(1e-6)) for p, q in pairs)
    print(f"after {2 * ACCUMULATED} batches the parameters are {apart:.0e} apart (float32)")


if __name__ == "__main__":
    main()
