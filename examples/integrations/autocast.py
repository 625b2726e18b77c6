"""
Mixed precision: autocast
=========================

In bfloat16 the fused kernels run on bfloat16 tensors; statistics, scales and sums stay in float32. Nothing to do but what
autocast needs anyway.
"""

from __future__ import annotations

import torch
from tiny import batches, build
from torch.nn.functional import cross_entropy

import bnrestructure


def main() -> None:
    model = bnrestructure.restructure(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i, (images, labels) in enumerate(batches(8)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 4 == 3:
            print(f"step {i}: loss {loss.item():.3f}")

    # verify() knows the training dtype: the restructured model must be as near to float64 as eager's bfloat16 is.
    report = bnrestructure.verify(model, batches(1)[0][0], dtype=torch.bfloat16, steps=1)
    print(str(report).splitlines()[0])


if __name__ == "__main__":
    main()
