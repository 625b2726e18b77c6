"""
Loss curves, with and without
=============================

Train a small network on real handwritten digits, with and without restructuring, and draw both loss curves.

.. code-block:: sh

    python examples/train_digits.py [--net resnet|densenet] [--epochs N] [--picture FILE.png]

All runs start from the same weights and see the same batches in the same order. Restructuring is the same computation
rounded in another order, so its curve lies on eager's at first and drifts away as float32 rounding grows. How far that
goes by itself, without this package, a third run shows: eager in another memory format.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torchvision.models import DenseNet

import bnrestructure


@dataclass
class Digits:
    """scikit-learn's 1797 digits of 8 x 8 pixels, scaled to [-1, 1]; images [N, 1, 8, 8], labels [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @staticmethod
    def load() -> Digits:
        data = load_digits()
        images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
        labels = torch.from_numpy(data.target).long()
        return Digits(images[:1500], labels[:1500], images[1500:], labels[1500:])


@dataclass
class Run:
    """What a training run left: the loss of each step, and the share of test digits it names right."""

    losses: list[float]
    accuracy: float

    @property
    def final_loss(self) -> float:
        """Mean over the last ten steps: a single batch's loss is mostly luck."""
        last = self.losses[-10:]
        return sum(last) / len(last)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in ResNet."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        z = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(z)) + self.shortcut(x))


def small_resnet() -> nn.Module:
    """Six convolutional layers for 8 x 8 images."""
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*stem, Block(16, 16, 1), Block(16, 32, 2), *head)


def small_densenet() -> nn.Module:
    """torchvision's DenseNet with two short blocks, and a stem that does not shrink 8 x 8 images away."""
    net = DenseNet(growth_rate=8, block_config=(4, 4), num_init_features=16, bn_size=2, num_classes=10)
    net.features.conv0 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    net.features.pool0 = nn.Identity()
    return net


NETS = {"resnet": small_resnet, "densenet": small_densenet}


def train(model: nn.Module, digits: Digits, epochs: int, batch: int = 100) -> Run:
    """Plain SGD with momentum; the order of the batches depends on nothing but the epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(batch):
            optimizer.zero_grad()
            loss = cross_entropy(model(digits.train_images[chosen]), digits.train_labels[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        right = model(digits.test_images).argmax(1) == digits.test_labels
    return Run(losses, right.double().mean().item())


@dataclass
class Comparison:
    """The runs of one network. ``control`` is eager in contiguous memory format, the others are channels_last."""

    net: str
    eager: Run
    restructured: Run
    control: Run


def compare(net: str, epochs: int) -> Comparison:
    """Train the network three times from the same weights."""
    digits = Digits.load()
    torch.manual_seed(0)
    contiguous = NETS[net]()
    eager = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    restructured = bnrestructure.restructure(copy.deepcopy(eager))
    return Comparison(net, *(train(model, digits, epochs) for model in (eager, restructured, contiguous)))


def draw(comparison: Comparison, path: Path) -> None:
    """Both loss curves in one picture, and beneath how far they are apart, beside how far two eager runs are."""
    from matplotlib.figure import Figure

    eager, restructured, control = comparison.eager, comparison.restructured, comparison.control
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    curves.plot(eager.losses, color="tab:blue", linewidth=4, alpha=0.4, label=f"eager (final {eager.final_loss:.4f})")
    curves.plot(
        restructured.losses, color="tab:red", linewidth=1, label=f"restructured (final {restructured.final_loss:.4f})"
    )
    curves.set(yscale="log", ylabel="training loss", title=f"small {comparison.net} on scikit-learn's digits")
    gap.plot(_apart(control, eager), color="tab:blue", alpha=0.4, label="eager contiguous - eager channels_last")
    gap.plot(_apart(restructured, eager), color="tab:red", linewidth=1, label="restructured - eager")
    gap.set(yscale="log", xlabel="step", ylabel="difference of losses")
    for axes in (curves, gap):
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _apart(run: Run, reference: Run) -> list[float]:
    """Absolute differences, step by step; zeros are drawn at float32's resolution, for the axis is logarithmic."""
    return [max(abs(a - b), 1e-8) for a, b in zip(run.losses, reference.losses, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on digits with and without restructuring, and draw both loss curves")
    parser.add_argument("--net", choices=NETS, default="resnet")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--picture", type=Path, default=Path("digits_loss.png"))
    options = parser.parse_args()
    comparison = compare(options.net, options.epochs)
    draw(comparison, options.picture)
    print(f"{'':18}final loss   test accuracy")
    runs = {"eager": comparison.eager, "restructured": comparison.restructured, "eager, contiguous": comparison.control}
    for name, run in runs.items():
        print(f"{name:18}{run.final_loss:10.4f}{run.accuracy:15.1%}")
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
