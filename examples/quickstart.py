"""
Quickstart
==========

Restructure a model, take a training step on real photos, and compare it with the original's.

.. code-block:: sh

    python examples/quickstart.py [MODEL]      # any torchvision classification model; densenet121 if none is named
"""

from __future__ import annotations

import copy
import sys

import torch
import torchvision
from photos import photo_batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bnrestructure
from bnrestructure.report.memory import saved_for_backward


def main() -> None:
    torch.manual_seed(0)
    name = sys.argv[1] if len(sys.argv) > 1 else "densenet121"
    original = torchvision.models.get_model(name, weights=None, num_classes=2).to(memory_format=torch.channels_last)
    model = copy.deepcopy(original)
    photos, labels = photo_batch(count=4, size=96)

    # The one line to add to a training script: before training, or between two steps of it.
    bnrestructure.restructure(model)
    print(bnrestructure.explain(model))

    # Same parameters, same optimiser, same step. The first one captures the graph.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = cross_entropy(model(photos), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    # From here on both again from the same weights: is it still the same function? In float64 rounding leaves no doubt.
    model.load_state_dict(original.state_dict())
    mine, its = (gradients(copy.deepcopy(m).double(), photos.double(), labels) for m in (model, original))
    worst = max(mine, key=lambda key: distance(mine[key], its[key]))
    print(f"largest difference of any gradient in float64: {distance(mine[worst], its[worst]):.1e} relative ({worst})")

    before, after = (saved_for_backward(m, lambda m=m: cross_entropy(m(photos), labels)) for m in (original, model))
    print(f"saved for the backward pass: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB ({after / before:.2f}x)")


def gradients(model: nn.Module, photos: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter after one backward pass."""
    # One seed for both, so that dropout drops the same.
    torch.manual_seed(1)
    cross_entropy(model(photos), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(a: Tensor, b: Tensor) -> float:
    """Relative distance of two gradients; those that are zero but for rounding count as equal."""
    return float((a - b).norm() / b.norm().clamp_min(1e-8))


if __name__ == "__main__":
    main()
