"""The verifier's quick float64 depthwise convolution is PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnrestructure.verify.draws import SameDraws


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(6, 6, 3, 1, 1, groups=6), (9, 7)),
        (nn.Conv2d(5, 5, 5, 2, 2, groups=5, bias=False), (8, 11)),
        (nn.Conv2d(4, 4, (3, 1), (1, 2), (2, 0), dilation=(2, 1), groups=4), (9, 8)),
        (nn.Conv3d(3, 3, 3, 1, 1, groups=3), (4, 5, 6)),
    ],
    ids=["3x3", "5x5 stride 2", "dilated", "3-D"],
)
def test_quick_depthwise_convolution_is_pytorchs(layer: nn.Module, size: tuple[int, ...]) -> None:
    layer = layer.double()
    x = torch.randn(2, layer.weight.shape[0], *size, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    cotangent = torch.randn_like(y)
    wanted = torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()])
    with SameDraws():
        quick = layer(x)
        found = torch.autograd.grad((quick * cotangent).sum(), [x, *layer.parameters()])
    torch.testing.assert_close(quick, y, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
