"""The kernels of benchmarks/gpu.py that are no convolution, checked against fp64 on a ragged shape."""

from __future__ import annotations

from typing import Any

import torch
from gpu_nodes import compared, poisoned
from torch import Tensor

from bnrestructure.kernels import cuda, reference
from bnrestructure.ops.edges import PoolGeometry, Transform

__all__ = ["check_sweeps"]


def check_sweeps(
    act: str, dtype: torch.dtype, device: str = "cuda", shape: tuple[int, ...] = (3, 70, 13, 9)
) -> dict[str, Any]:
    """Every kernel that is no convolution, on a ragged shape, as gpu_nodes.check_node checks those."""
    c = shape[1]
    drawn = [(torch.randn(shape, device=device) + 2).to(dtype, memory_format=torch.channels_last) for _ in range(4)]
    pooled = torch.randn(shape[:2], device=device).to(dtype)
    vectors = [torch.rand(c, device=device) + 0.5 for _ in range(4)]
    window = PoolGeometry((3, 3), (2, 2), (1, 1), False)

    def results(kernels: Any, compute: torch.dtype) -> list[Tensor]:
        wide = compute == torch.float64
        x, y, dz, dout = (t.double() if wide else t for t in drawn)
        mean, scale, beta, a = (v.double() if wide else v for v in vectors)
        t, own = Transform(mean, scale, beta, act), Transform(mean, scale, beta)
        joined = kernels.residual_forward(x, own, y, Transform(), act, dtype=compute, statistics=True)
        found = [
            kernels.statistics_forward(x),
            (kernels.statistics_backward(x, mean, scale, beta, y.clone()),),
            (kernels.normalise_forward(x, t, dtype=compute),),
            kernels.normalise_backward(dz, x, t, accumulate=y.clone()),
            joined,
            kernels.residual_backward(dout, (a, beta, mean), x, own, y, own, joined[0], act),
            (kernels.max_pool_forward(x, t, window, dtype=compute)[0],),
            (kernels.squeeze_forward(x, t, dtype=compute),),
            kernels.squeeze_backward(pooled.double() if wide else pooled, dz, x, t),
            kernels.finalize_forward(mean, scale, 100, beta, a, None, None, 0.1, 1e-5),
            kernels.finalize_backward(mean, scale, beta),
        ]
        return [tensor for group in found for tensor in group if tensor is not None]

    truth, theirs = results(reference, torch.float64), results(reference, dtype)
    with poisoned():
        ours = results(cuda, dtype)
    return compared(ours, theirs, truth, torch.finfo(dtype).eps)
