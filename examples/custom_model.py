"""
A model with parts that cannot be rewritten
===========================================

What the plan says of them, and that the rest is rewritten.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnrestructure


def conv_bn_relu(channels_in: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class Refine(nn.Module):
    """Its control flow depends on the data: no graph that is captured ahead of time can hold both branches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(channels, channels), conv_bn_relu(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            if x.mean() > 0.4:
                break
            x = x + self.body(x)
        return x


class Recomputed(nn.Module):
    """Trades time for memory itself: its body runs again in the backward pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(channels, channels), conv_bn_relu(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class CustomNet(nn.Module):
    """Ordinary layers around a data-dependent part, a checkpointed part and a layer that somebody watches."""

    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, channels), conv_bn_relu(channels, channels))
        self.refine = Refine(channels)
        self.recomputed = Recomputed(channels)
        self.watched = nn.Sequential(conv_bn_relu(channels, channels), conv_bn_relu(channels, channels))
        self.head = nn.Sequential(conv_bn_relu(channels, channels), nn.Conv2d(channels, classes, 1))
        self.seen: list[float] = []
        self.watched[0].register_forward_hook(lambda module, args, output: self.seen.append(output.mean().item()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.recomputed(self.refine(self.stem(x)))
        return self.head(self.watched(x)).mean((2, 3))


def build() -> CustomNet:
    torch.manual_seed(0)
    return CustomNet()


def main() -> None:
    original, model = build(), bnrestructure.restructure(build())

    plan = bnrestructure.explain(model)
    print(plan)
    width = max(len(site.name) for site in plan.sites)
    for site in plan.sites:
        print(f"    {site.name:{width}}  {site.status:8} {site.reason or site.pattern}")
    print("captured and rewritten:", ", ".join(plan.regions))

    x = torch.randn(4, 3, 24, 24)
    for network in (original, model):
        network(x).square().sum().backward()
    pairs = list(zip(original.parameters(), model.parameters(), strict=True))
    worst = max(float((p.grad - q.grad).norm() / p.grad.norm().clamp_min(1e-6)) for p, q in pairs)
    print(f"largest relative difference of any gradient: {worst:.1e} (float32)")
    print(f"the hook saw {model.seen[0]:.6f}, in the original {original.seen[0]:.6f}")


if __name__ == "__main__":
    main()
