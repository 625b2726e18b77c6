"""What is kept for backward leaves memory that backward can use again, and is otherwise a tensor like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bnrestructure
from bnrestructure.bench.settings import MALLOC
from bnrestructure.core.kept import kept_activation

_REUSE = """
import torch
from bnrestructure.core.kept import kept_activation

shape, here = (2, 32, 128, 128), torch.device("cpu")
kept, between = [], []
for _ in range(6):
    kept.append(kept_activation(shape, torch.float32, here))
    between.append(torch.empty(20_000))  # lives on, so that holes cannot grow together
del kept
gradients = [torch.empty(shape) for _ in range(6)]
print(max(x.data_ptr() for x in gradients) < between[-1].data_ptr())  # malloc did not have to ask for more
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc's malloc, which Linux has")
def test_gradients_go_where_kept_activations_were() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _REUSE], env=os.environ | MALLOC["tuned"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "True"


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 301), (2, 33, 40, 29), (1, 9, 17, 20, 21), (1, 1, 1, 1), (0, 4, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_it_is_a_channels_last_tensor_of_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = kept_activation(shape, dtype, torch.device("cpu"))
    assert x.shape == shape
    assert x.dtype == dtype
    assert x.movedim(1, -1).is_contiguous()
    assert not x._is_view(), "autograd forbids writing into views that a node made"


def test_an_output_can_be_copied_saved_and_written_to(tmp_path: Path) -> None:
    model = bnrestructure.restructure(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3)))
    y = model(torch.randn(2, 3, 64, 64))
    torch.save(y.detach(), tmp_path / "y.pt")
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), y.detach(), rtol=0, atol=0)
    assert torch.equal(y.clone(), y)
    assert torch.equal(y.flatten(), y.reshape(-1))
    y.add_(1.0).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
