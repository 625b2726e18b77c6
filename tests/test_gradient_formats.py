"""Gradients come back in the memory format of their tensors: PyTorch's own batch norm behind a fused node needs that to be exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnrestructure import ops

VECTORS = torch.zeros(8), torch.ones(8), torch.zeros(8)
NODES: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda x: ops.conv(
        x, None, None, None, torch.ones(4, 8, 3, 3), None, act="relu", stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1
    ).y,
    "threaded conv": lambda x: ops.conv(
        x, None, None, None, torch.ones(4, 8, 1, 1), None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, chain=True
    ).passed,
    "normalise": lambda x: ops.normalise(x, *VECTORS, act="relu")[0],
    "max_pool": lambda x: ops.max_pool(x, *VECTORS, kernel=(2, 2), stride=(2, 2), padding=(0, 0))[0],
    "squeeze": lambda x: ops.squeeze(x, *VECTORS, act="relu")[0],
    "statistics": lambda x: ops.statistics(x).var,
    "residual": lambda x: ops.residual(x, *VECTORS, x.flip(0), act="relu").out,
}


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_their_tensors_format(node: str, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 8, 6, 10).contiguous(memory_format=memory_format).requires_grad_()
    seen = []
    made = x * 1.0  # a tensor whose gradient no accumulator puts into another format
    made.register_hook(lambda g: seen.append(g.is_contiguous(memory_format=memory_format)))
    NODES[node](made).square().sum().backward()
    assert seen == [True]
