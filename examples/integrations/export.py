"""
Exporting after training
========================

An exporter wants the plain model: ``unrestructure`` gives its own forward back, with the trained weights in it.
"""

from __future__ import annotations

import torch
from tiny import batches, build
from torch.nn.functional import cross_entropy

import bnrestructure


def main() -> None:
    model = bnrestructure.restructure(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in batches(4):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    bnrestructure.unrestructure(model)
    model.eval()
    images = batches(1)[0][0]
    exported = torch.export.export(model, (images,))
    with torch.no_grad():
        same = torch.equal(exported.module()(images), model(images))
    print(f"{len(list(exported.graph.nodes))} nodes, outputs equal: {same}")


if __name__ == "__main__":
    main()
