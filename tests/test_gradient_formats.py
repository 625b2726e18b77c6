"""Gradients come back in the memory format of their tensors: PyTorch's own batch norm behind a fused node needs that to be exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnrestructure import ops
from bnrestructure.core.edges import ConvGeometry, PoolGeometry, Transform

VECTORS = Transform(torch.zeros(8), torch.ones(8), torch.zeros(8))
RELU = VECTORS._replace(act="relu")
POINT = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
NODES: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda x: ops.conv(x, Transform(act="relu"), torch.ones(4, 8, 3, 3), None, POINT._replace(padding=(1, 1))).y,
    "chained conv": lambda x: ops.conv(x, Transform(), torch.ones(4, 8, 1, 1), None, POINT, chain=True).passed,
    "normalise": lambda x: ops.normalise(x, RELU)[0],
    "max_pool": lambda x: ops.max_pool(x, VECTORS, PoolGeometry((2, 2), (2, 2), (0, 0)))[0],
    "squeeze": lambda x: ops.squeeze(x, RELU)[0],
    "statistics": lambda x: ops.statistics(x).var,
    "residual": lambda x: ops.residual(x, VECTORS, x.flip(0), act="relu").out,
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
