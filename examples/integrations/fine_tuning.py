"""
Fine-tuning: freezing layers and batch norms
============================================

Frozen parameters get no gradient, and a batch norm in eval mode in a training model normalises with its running statistics and
does not change them. Both are as in eager. The model is captured again by itself when the pattern of training flags changes:
freeze whenever you like, ``restructure`` once.
"""

from __future__ import annotations

import torch
from tiny import batches, build
from torch import nn
from torch.nn.functional import cross_entropy

import bnrestructure


def freeze(module: nn.Module) -> None:
    """No gradients, and batch norms that keep their statistics."""
    module.requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def main() -> None:
    model = bnrestructure.restructure(build())  # a pretrained one, say
    model.train()
    freeze(model[0])
    freeze(model[1])
    print(bnrestructure.explain(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for images, labels in batches(4):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    print(f"changed by training: the parts {', '.join(sorted(changed))}")


if __name__ == "__main__":
    main()
