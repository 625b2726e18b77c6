"""
What does a model keep in memory?
=================================

Most of a training step's peak is what autograd keeps for backward. ``explain`` with inputs says how large each batch norm's
tensor is, ``saved_for_backward`` measures what is kept, and ``bnrestructure bench MODEL --plot memory`` draws a step as curves.
The picture here is made by the same function.
"""

from __future__ import annotations

import torch
import torchvision
from matplotlib import pyplot as plt
from tiny import batches
from torch import nn

import bnrestructure
from bnrestructure.bench.curves import memory_curve
from bnrestructure.bench.panels import curves
from bnrestructure.bench.workload import TrainingStep
from bnrestructure.report.memory import saved_for_backward


def build() -> nn.Module:
    return torchvision.models.mobilenet_v2(weights=None, width_mult=0.5).to(memory_format=torch.channels_last)


def main() -> None:
    images, _ = batches(1, batch=16, size=64)[0]
    steps = {
        "eager channels_last": TrainingStep(build(), (images,), "cpu"),
        "restructured": TrainingStep(bnrestructure.restructure(build()), (images,), "cpu"),
    }
    found = {}
    for name, step in steps.items():
        step()  # what a first step makes and keeps is not a step's
        print(f"{name:20} keeps {saved_for_backward(step.model, step) / 1e6:.1f} MB for backward")
        found[name] = memory_curve(step)

    plan = bnrestructure.explain(steps["restructured"].model, images)
    largest = max(plan.sites, key=lambda site: site.bytes_before or 0)
    before, after = ((number or 0) / 1e6 for number in (largest.bytes_before, largest.bytes_after))
    shape = "x".join(map(str, largest.shape or ()))
    print(f"largest: {largest.name}, {shape}; its sweeps moved {before:.0f} MB a step, and move {after:.0f} now")

    figure, axes = plt.subplots(figsize=(7, 3.6))
    curves(axes, found)
    figure.tight_layout()
    plt.show()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
