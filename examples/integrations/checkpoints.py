"""
Checkpoints, and resuming with and without the package
======================================================

A ``state_dict`` has the keys and tensors of the plain model, so checkpoints go both ways: what was trained restructured is
loaded and trained on where the package is not installed, and the other way round, the optimiser's state included.

``torch.save(model)``, the whole object, is another matter: it names the class that restructuring generated, and loads only
where the package is. Save the ``state_dict``, or call ``unrestructure`` first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tiny import batches, build
from torch import nn
from torch.nn.functional import cross_entropy

import bnrestructure


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list) -> float:
    for images, labels in steps:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    data = batches(8)
    model = bnrestructure.restructure(build())
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, data[:4])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        print(f"uninterrupted:                loss {train(model, optimizer, data[4:]):.4f}")

        for name, resumed in (("resumed, restructured", bnrestructure.restructure(build())), ("resumed, without the package", build())):
            optimizer = torch.optim.AdamW(resumed.parameters())
            state = torch.load(file)
            resumed.load_state_dict(state["model"], strict=True)
            optimizer.load_state_dict(state["optimizer"])
            print(f"{name + ':':30}loss {train(resumed, optimizer, data[4:]):.4f}")


if __name__ == "__main__":
    main()
