"""Models that the tests of the verifier check, small and with everything that passes rewrite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnrestructure import VerificationReport, verify


class Net(nn.Module):
    """conv-bn-relu-conv, a growing and a branching concat, a residual join with identity, a pool, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 5, 3, bias=False)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(y)))
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.last(F.relu(self.bn3(x)))
        return self.head(self.drop(x).mean((2, 3)))


class Joins(nn.Module):
    """Two residual joins in a row: the first is formed by the second branch's convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, k, padding=k // 2, bias=False) for k in (3, 1, 1, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(5)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[4](self.stem(x)))
        for i in (0, 2):
            branch = F.relu(self.norms[i](self.convs[i](x)))
            x = F.relu(x + self.norms[i + 1](self.convs[i + 1](branch)))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """A dense block: every layer, a bottleneck and a 3x3, reads the concat of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.conv1 = nn.ModuleList(nn.Conv2d(6 + 4 * i, 8, 1, bias=False) for i in range(3))
        self.norm2 = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.conv2 = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1, bias=False) for _ in range(3))
        self.norm = nn.BatchNorm2d(18)
        self.head = nn.Conv2d(18, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm1, conv1, norm2, conv2 in zip(self.norm1, self.conv1, self.norm2, self.conv2, strict=True):
            y = conv1(F.relu(norm1(torch.cat(features, 1))))
            features.append(conv2(F.relu(norm2(y))))
        return self.head(F.relu(self.norm(torch.cat(features, 1))))


def built(cls: type[nn.Module]) -> nn.Module:
    """A model whose batch norms have weights, biases and running statistics of their own, so that mix-ups show."""
    torch.manual_seed(1)
    model = cls()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.5)
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(2))


def check(model: nn.Module, inputs: Any = None, **options: Any) -> VerificationReport:
    return verify(model, images() if inputs is None else inputs, **{"backend": "reference", **options})


