"""
Averaging weights: EMA and SWA
==============================

``AveragedModel`` makes a deep copy. A copy of a restructured model is restructured, too, and in eval mode runs the model's own
forward, so nothing is to be done. After training, SWA's pass over the data that renews the running statistics is a training
forward and runs restructured.
"""

from __future__ import annotations

import torch
from tiny import batches, build, loader
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bnrestructure


def main() -> None:
    model = bnrestructure.restructure(build())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in batches(32):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
    update_bn(loader(32), average)
    images, labels = batches(1, batch=64)[0]
    with torch.no_grad():
        right = (average.eval()(images).argmax(1) == labels).float().mean()
    print(f"the averaged model is right on {right:.0%} of what it was trained on")


if __name__ == "__main__":
    main()
