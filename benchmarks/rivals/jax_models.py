"""torchvision's DenseNets, ResNet-50 and MobileNetV2 as Flax Linen modules: NHWC, batch norm in training mode, parameters in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = ["MODELS"]


class Layers(nn.Module):
    """What every network here is made of, with its ``dtype`` (of computation)."""

    dtype: Any = jnp.float32

    def conv(self, features: int, kernel: int, stride: int = 1, groups: int = 1) -> Any:
        padding = [(kernel // 2, kernel // 2)] * 2
        return nn.Conv(
            features, (kernel, kernel), (stride, stride), padding, feature_group_count=groups, use_bias=False, dtype=self.dtype,
            param_dtype=jnp.float32,
        )  # fmt: skip

    def norm(self) -> Any:
        return nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=self.dtype, param_dtype=jnp.float32)

    def head(self, x: Any) -> Any:
        return nn.Dense(1000, dtype=self.dtype, param_dtype=jnp.float32)(x.mean((1, 2)))


_max_pool = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=[(1, 1), (1, 1)])


class DenseNet(Layers):
    """Growth 32, bottlenecks of 128."""

    blocks: Sequence[int] = (6, 12, 24, 16)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = _max_pool(nn.relu(self.norm()(self.conv(64, 7, 2)(x))))
        for i, layers in enumerate(self.blocks):
            for _ in range(layers):
                y = self.conv(128, 1)(nn.relu(self.norm()(x)))
                y = self.conv(32, 3)(nn.relu(self.norm()(y)))
                x = jnp.concatenate([x, y], -1)
            x = nn.relu(self.norm()(x))
            if i + 1 < len(self.blocks):
                x = nn.avg_pool(self.conv(x.shape[-1] // 2, 1)(x), (2, 2), (2, 2))
        return self.head(x)


class ResNet50(Layers):
    """Bottlenecks, the stride in the 3x3 convolution."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = _max_pool(nn.relu(self.norm()(self.conv(64, 7, 2)(x))))
        for i, blocks in enumerate((3, 4, 6, 3)):
            for j in range(blocks):
                x = self._bottleneck(x, 64 * 2**i, 2 if i and not j else 1)
        return self.head(x)

    def _bottleneck(self, x: Any, width: int, stride: int) -> Any:
        y = nn.relu(self.norm()(self.conv(width, 1)(x)))
        y = nn.relu(self.norm()(self.conv(width, 3, stride)(y)))
        y = self.norm()(self.conv(4 * width, 1)(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(4 * width, 1, stride)(x))
        return nn.relu(x + y)


class MobileNetV2(Layers):
    """Inverted residuals."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu6(self.norm()(self.conv(32, 3, 2)(x)))
        for expand, out, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for i in range(count):
                x = self._inverted(x, expand, out, stride if i == 0 else 1)
        return self.head(nn.relu6(self.norm()(self.conv(1280, 1)(x))))

    def _inverted(self, x: Any, expand: int, out: int, stride: int) -> Any:
        hidden = x.shape[-1] * expand
        y = x
        if expand != 1:
            y = nn.relu6(self.norm()(self.conv(hidden, 1)(y)))
        y = nn.relu6(self.norm()(self.conv(hidden, 3, stride, groups=hidden)(y)))
        y = self.norm()(self.conv(out, 1)(y))
        return x + y if x.shape == y.shape else y


MODELS = {
    "densenet121": partial(DenseNet, blocks=(6, 12, 24, 16)),
    "densenet201": partial(DenseNet, blocks=(6, 12, 48, 32)),
    "resnet50": ResNet50,
    "mobilenet_v2": MobileNetV2,
}


def parameter_count(variables: Any) -> int:
    """Of a model's ``params``: torchvision's number, or the module is another network."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
