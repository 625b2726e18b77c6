"""Fake tensors of a capture are laid out in memory as the real ones are (capture/fakes.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from torch import Tensor, nn
from torch.nn import functional as F

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


def test_a_seeded_dropout_behind_a_group_norm_draws_eagers_mask() -> None:
    torch.manual_seed(0)
    model, x = GroupNormAndDropout().double().train(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_same_values(training_step(restructured_copy(model), x, seed=3), training_step(model, x, seed=3))
