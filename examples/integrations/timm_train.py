"""
timm's training script
======================

What timm's ``train.py`` does, in short, with the line that is added to it: behind ``create_model`` and the memory format,
before the optimiser and ``ModelEmaV3``. In a clone of that script the same line goes behind ``if args.channels_last:
model.to(memory_format=torch.channels_last)``.
"""

from __future__ import annotations

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from tiny import batches

import bnrestructure


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4, in_chans=3)
    model = model.to(memory_format=torch.channels_last)

    bnrestructure.restructure(model)  # the line that is added

    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=1e-4)
    ema = ModelEmaV3(model, decay=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=4)
    criterion = LabelSmoothingCrossEntropy(0.1)
    model.train()
    for update, (images, labels) in enumerate(batches(4, size=32)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
        optimizer.step()
        ema.update(model, step=update)
        scheduler.step_update(update)
    print(f"loss {loss.item():.3f}")
    print(bnrestructure.explain(model))


if __name__ == "__main__":
    main()
