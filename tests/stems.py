"""A few layers to build models of, and building one."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["built", "stem"]


def stem(
    channels: int = 4, kind: type[nn.Module] = nn.Conv2d, norm: type[nn.Module] = nn.BatchNorm2d, inputs: int = 3
) -> nn.Sequential:
    return nn.Sequential(kind(inputs, channels, 3, padding=1), norm(channels), nn.ReLU(), kind(channels, channels, 3, padding=1))  # type: ignore[call-arg]


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().train()
