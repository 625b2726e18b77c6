"""
torchvision's training loop
===========================

The loop of torchvision's reference scripts, with one line more. Data come in channels_last, as everywhere else for speed on
CPUs.
"""

from __future__ import annotations

import torch
import torchvision
from tiny import loader
from torch import nn

import bnrestructure


def train_one_epoch(model: nn.Module, data: torch.utils.data.DataLoader, optimizer: torch.optim.Optimizer, criterion: nn.Module) -> float:
    model.train()
    for images, targets in data:
        images = images.to(memory_format=torch.channels_last)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(weights=None, num_classes=4).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    bnrestructure.restructure(model)  # the one line; before or after making the optimiser

    print(bnrestructure.explain(model))
    for epoch in range(2):
        loss = train_one_epoch(model, loader(3), optimizer, nn.CrossEntropyLoss(label_smoothing=0.1))
        scheduler.step()
        print(f"epoch {epoch}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
