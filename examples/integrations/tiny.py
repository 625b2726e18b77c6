"""What the how-tos share: a network with batch norms that trains in seconds, and data for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["batches", "build", "loader"]

_CLASSES = 4


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def build(channels: int = 16, seed: int = 0) -> nn.Sequential:
    """A small residual network for 3-channel images of any size, the same weights for the same seed."""
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, _CLASSES))
    return nn.Sequential(stem, Block(channels), Block(channels), head).to(memory_format=torch.channels_last)


def batches(count: int, batch: int = 8, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Images [batch, 3, size, size] in channels_last with labels [batch]: each class is brighter in a quarter of its own."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        labels = torch.randint(_CLASSES, (batch,), generator=generator)
        images = torch.randn(batch, 3, size, size, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            half = size // 2
            image[:, half * (label // 2) :][:, :half, half * (label % 2) :][:, :, :half] += 1
        made.append((images.to(memory_format=torch.channels_last), labels))
    return made


def loader(count: int, batch: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """The same as a DataLoader, in a fixed order."""
    images, labels = (torch.cat(parts) for parts in zip(*batches(count, batch), strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=batch)
