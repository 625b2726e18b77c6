"""Fake tensors of a capture are laid out in memory as the real ones are, and fail silently (capture/fakes.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.capture.fakes import FaithfulFakeMode
from bnrestructure.ops.formats import order_of

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(3, 8, 6, 6),
    "channels_last": lambda: torch.randn(3, 8, 6, 6).contiguous(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(3, 6, 6, 8).permute(0, 3, 2, 1),
}
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": lambda x: F.group_norm(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm of running statistics": lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8)),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "roll": lambda x: x.roll(1, 2),
    "roll of two dimensions": lambda x: x.roll((1, 2), (2, 3)),
    "logsigmoid": F.logsigmoid,
    "rrelu": lambda x: F.rrelu(x, training=True),
    "instance_norm": F.instance_norm,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fake_result_is_laid_out_as_the_real_one(operation: str, layout: str) -> None:
    x = LAYOUTS[layout]()
    real = OPERATIONS[operation](x)
    with FaithfulFakeMode(allow_non_fake_inputs=True):
        fake = OPERATIONS[operation](torch.empty_strided(x.shape, x.stride()))
    assert fake.dtype == real.dtype
    assert order_of(fake.shape, fake.stride()) == order_of(real.shape, real.stride())


#: Shapes and strides with dimensions of one element, by which a convolution takes the tensor for one format or the other.
ONES = [
    ((2, 1, 7, 7), (49, 1, 7, 1)), ((2, 1, 7, 7), (49, 49, 7, 1)), ((2, 2, 1, 1), (2, 1, 2, 2)), ((2, 2, 1, 1), (2, 1, 1, 1)),
    ((2, 1, 7, 1), (7, 1, 1, 1)), ((2, 1, 7, 1), (7, 1, 1, 7)), ((1, 3, 1, 5), (15, 1, 15, 3)), ((1, 3, 1, 5), (3, 1, 15, 3)),
    ((1, 4, 5, 5), (4, 1, 20, 4)), ((1, 4, 5, 5), (25, 25, 5, 1)),
]  # fmt: skip
OF_ONES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "sigmoid": torch.sigmoid, "leaky_relu": F.leaky_relu, "relu6": F.relu6,
    "logsigmoid": F.logsigmoid, "clamp": lambda x: x.clamp(0), "square": lambda x: x**2, "sum": lambda x: x + x,
    "product with a number": lambda x: x * 2, "comparison": lambda x: x > 0, "gate": lambda x: x * x.mean((2, 3), keepdim=True),
    "prelu": lambda x: F.prelu(x, torch.ones(1)), "dropout": lambda x: F.dropout(x, 0.5), "copy": torch.clone,
    "half": lambda x: x.half(), "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last), "zeros": torch.zeros_like,
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True), "group_norm": lambda x: F.group_norm(x, 1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]), "convolution": lambda x: F.conv2d(x, torch.randn(4, x.shape[1], 1, 1)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2), "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "max_pool2d": lambda x: F.max_pool2d(x, 1), "concat": lambda x: torch.cat([x, x], 1), "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.shape),
    "unflatten": lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
}  # fmt: skip


@pytest.mark.parametrize("operation", OF_ONES)
def test_a_fake_result_has_the_strides_of_the_real_one_along_dimensions_of_one_element(operation: str) -> None:
    for shape, stride in ONES:
        real = OF_ONES[operation](torch.empty_strided(shape, stride).fill_(1.5))
        with FaithfulFakeMode(allow_non_fake_inputs=True):
            fake = OF_ONES[operation](torch.empty_strided(shape, stride))
        assert (shape, stride, fake.shape, fake.stride()) == (shape, stride, real.shape, real.stride())


class OneChannelAndDropout(nn.Module):
    """Tokens become an image of one channel again, as a spatial attention does it; a convolution lays its result out by their strides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.ReLU())
        self.mix, self.widen, self.dropout = nn.Linear(1, 1), nn.Conv2d(1, 4, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.mix(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape)
        out: Tensor = self.dropout(self.widen(y))
        return out


class GroupNormAndDropout(nn.Module):
    """A group norm in the middle of what a permutation made channels_last, and a dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.group_norm, self.dropout = nn.GroupNorm(2, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        tokens = y.flatten(2).transpose(1, 2).contiguous()
        y = tokens.transpose(1, 2).reshape(y.shape)
        out: Tensor = self.dropout(self.group_norm(y))
        return out


@pytest.mark.parametrize("kind", [GroupNormAndDropout, OneChannelAndDropout])
def test_a_seeded_dropout_draws_eagers_mask(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().double().train(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_same_values(training_step(restructured_copy(model), x, seed=3), training_step(model, x, seed=3))


class OfSmallImages(nn.Module):
    """Takes images of 32x32 alone: the sizes that a plan guesses first fail in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))
        self.head = nn.Linear(4 * 8 * 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).flatten(1))
        return out


def test_guessed_sizes_that_do_not_fit_are_not_logged_as_errors(capfd: pytest.CaptureFixture[str]) -> None:
    plan = bnrestructure.explain(OfSmallImages())
    assert plan.counts["fused"] == 1
    assert capfd.readouterr().err == ""
