"""
torch.compile
=============

The same passes on the graph that Dynamo captured. Instead of ``restructure``, not in addition to it: a restructured model is
run as it is by other backends of ``torch.compile``, with a graph break around its forward.
"""

from __future__ import annotations

import torch
from tiny import batches, build
from torch.nn.functional import cross_entropy

import bnrestructure  # registers the backend


def main() -> None:
    model = build()
    compiled = torch.compile(model, backend="bnrestructure")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in batches(4):
        loss = cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")
    print(bnrestructure.explain(model))


if __name__ == "__main__":
    main()
