"""Small models, one for each way in which batch norm meets its neighbours. All run in a few milliseconds in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SMALL_MODELS", "build", "input_for"]


def conv_bn(inputs: int, outputs: int, kernel: int = 3, *, act: nn.Module | None = None, **options: int) -> nn.Sequential:
    """conv-bn-act with 'same' padding."""
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True) if act is None else act)


class Chain(nn.Module):
    """conv-bn-relu-conv-bn-relu-pool-linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class BasicBlock(nn.Module):
    """ResNet's block; the shortcut has a batch norm of its own when the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    """Stem with a max pool, an identity join, a downsampling join, another identity join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3 = BasicBlock(6, 6), BasicBlock(6, 8, 2), BasicBlock(8, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.pool(self.stem(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class PreactResidual(nn.Module):
    """bn-relu-conv blocks: the batch norm reads the join's raw sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(5)])
        self.conv = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in (0, 2):
            out = self.conv[i](F.relu(self.bn[i](x)))
            x = x + self.conv[i + 1](F.relu(self.bn[i + 1](out)))
        return F.relu(self.bn[4](x))


class DenseLayer(nn.Module):
    """bn-relu-conv1x1-bn-relu-conv3x3 over the concat of all features so far."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        out = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(out)))


class DenseBlock(nn.Module):
    """DenseNet: a growing concat, a transition with an average pool, a final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.layers = nn.ModuleList([DenseLayer(4 + 3 * i, 3) for i in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(13), nn.ReLU(inplace=True), nn.Conv2d(13, 6, 1, bias=False))
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return F.relu(self.norm(self.pool(self.transition(torch.cat(features, 1)))))


class Inception(nn.Module):
    """Four branches joined by a concat that a convolution and a max pool read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.branch1 = conv_bn(6, 3, 1)
        self.branch2 = nn.Sequential(conv_bn(6, 4, 1), conv_bn(4, 5, 3))
        self.branch3 = nn.Sequential(conv_bn(6, 2, 1), conv_bn(2, 3, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(6, 2, 1))
        self.after, self.pool = conv_bn(13, 4, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)
        return self.after(x), self.pool(x)


class Aggregation(nn.Module):
    """VoVNet's one-shot aggregation of layers that each other read, with a pooled segment and a concat inside the concat, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 6), nn.MaxPool2d(3, 2, 1))
        self.first, self.second = conv_bn(6, 4), conv_bn(4, 3)
        self.wide, self.high = conv_bn(3, 2, 1), conv_bn(3, 2)
        self.project, self.after = conv_bn(17, 5, 1), conv_bn(17, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        first = self.first(x)
        second = self.second(first)
        x = torch.cat([x, first, second, torch.cat([self.wide(second), self.high(second)], 1)], 1)
        return self.project(x), self.after(F.avg_pool2d(x, 3, 1, 1))


class InvertedResidual(nn.Module):
    """MobileNet: expand, depthwise, linear bottleneck, identity join without an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6, act=nn.ReLU6())
        self.expand = conv_bn(6, 12, 1, act=nn.ReLU6())
        self.depthwise = conv_bn(12, 12, 3, act=nn.ReLU6(), groups=12)
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = conv_bn(6, 8, 1, act=nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x)


class SqueezeExcite(nn.Module):
    """EfficientNet: conv-bn-silu, gated by its own average, into a linear bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = conv_bn(3, 8, act=nn.SiLU())
        self.fc1, self.fc2 = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = conv_bn(6, 4, 1, act=nn.Hardswish())

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        gate = torch.sigmoid(self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.project(gate * x))


class UNet(nn.Module):
    """Down, up by a transposed convolution and by interpolation, with concat skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv_bn(3, 4), conv_bn(4, 6), conv_bn(6, 8)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 4, 1)
        self.merge2, self.merge1 = conv_bn(12, 6), conv_bn(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.merge2(torch.cat([self.up2(c), b], 1))
        up = F.interpolate(self.up1(b), size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(self.merge1(torch.cat([a, up], 1)))


class Functional(nn.Module):
    """Everything spelt with functions and methods; parameters and buffers of the module itself."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.3)
        self.w2 = nn.Parameter(torch.randn(6, 1, 3, 3) * 0.3)
        self.w3 = nn.Parameter(torch.randn(4, 6, 1, 1) * 0.3)
        self.gamma, self.beta = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.w1, stride=2, padding=1)
        y = F.batch_norm(y, self.running_mean, self.running_var, self.gamma, self.beta, self.training, 0.2, 1e-3)
        y = torch.conv2d(torch.relu(y), self.w2, None, 1, 1, 1, 6)
        y = F.batch_norm(y, None, None, weight=self.gamma, training=True).relu()
        y = F.conv2d(y, self.w3)
        return F.leaky_relu(F.batch_norm(y, None, None, training=True), 0.2)


class Strange(nn.Module):
    """Grouped, dilated, strided and asymmetric convolutions; GELU, LeakyReLU and an activation that nothing can ride with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, (3, 5), padding=(1, 2)), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding=2), nn.BatchNorm2d(12)
        self.c, self.bn_c = nn.Conv2d(12, 6, 5, stride=(2, 1), padding=2, groups=2), nn.BatchNorm2d(6)
        self.d, self.bn_d = nn.Conv2d(6, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6)
        self.e = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn_a(self.a(x)))
        x = F.leaky_relu(self.bn_b(self.b(x)), 0.1)
        x = torch.tanh(self.bn_c(self.c(x)))
        return self.e(F.gelu(self.bn_d(self.d(x)), approximate="tanh"))


class Video(nn.Module):
    """3-D convolutions and BatchNorm3d with a residual join."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(3, 5, 3, padding=1, bias=False), nn.BatchNorm3d(5)
        self.conv2, self.bn2 = nn.Conv3d(5, 5, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(5)
        self.conv3 = nn.Conv3d(5, 2, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.conv3(x)


class Signal(nn.Module):
    """1-D convolutions with BatchNorm1d, then Linear with BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 6, 5, padding=2), nn.BatchNorm1d(6)
        self.conv2, self.bn2 = nn.Conv1d(6, 6, 3, stride=2), nn.BatchNorm1d(6)
        self.fc1, self.bn3, self.fc2 = nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x))).mean(2)
        return self.fc2(F.relu(self.bn3(self.fc1(x))))


SMALL_MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "preact": PreactResidual,
    "dense": DenseBlock,
    "inception": Inception,
    "aggregation": Aggregation,
    "inverted": InvertedResidual,
    "squeeze_excite": SqueezeExcite,
    "unet": UNet,
    "functional": Functional,
    "strange": Strange,
    "video": Video,
    "signal": Signal,
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The named model in training mode, its batch norm parameters away from their defaults."""
    torch.manual_seed(seed)
    model = SMALL_MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return model.to(dtype).train()


def input_for(name: str, dtype: torch.dtype = torch.float64, batch: int = 4, size: int = 12, seed: int = 1) -> Tensor:
    """An input that the named model takes."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"video": (batch, 3, 3, size, size), "signal": (batch, 3, 2 * size)}.get(name, (batch, 3, size, size))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
