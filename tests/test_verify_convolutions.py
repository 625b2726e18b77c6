"""The convolutions that the verifier computes itself are PyTorch's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from bnrestructure.verification.draws import SameDraws


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


#: In PyTorch 2.15 on AVX-512 the third part of these weight gradients or so ends such a process (oneDNN issue 6035).
STRIDED = """
import torch
from bnrestructure.verification.draws import SameDraws

torch.set_num_threads(1)
layer = torch.nn.Conv2d(3, 64, 1, 2)
for _ in range(20):
    x = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn(2, 64, 112, 112).contiguous(memory_format=torch.channels_last)
    others = [torch.full((n,), 7.0) for n in (100, 1000, 10000, 100000)]
    with SameDraws():
        found = torch.autograd.grad((layer(x) * cotangent).sum(), [x, *layer.parameters()])
    assert all((t == 7).all() for t in others)
truth = torch.nn.Conv2d(3, 64, 1, 2).double()
truth.load_state_dict(layer.state_dict())
exact = x.detach().double().requires_grad_()
wanted = torch.autograd.grad((truth(exact) * cotangent.double()).sum(), [exact, *truth.parameters()])
for a, b in zip(found, wanted, strict=True):
    torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
"""


def test_strided_pointwise_weight_gradients_stay_within_their_memory() -> None:
    found = subprocess.run([sys.executable, "-c", STRIDED], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
