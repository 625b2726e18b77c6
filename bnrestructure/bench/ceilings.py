"""What the machine can do at best: multiply-adds a second, and bytes copied a second, measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

__all__ = ["copy_bandwidth", "fma_ceiling"]

_SIZE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
_COPY_BYTES = 2**28
_REPEATS = 5


def fma_ceiling(device: str, dtype: torch.dtype) -> float:
    """The highest rate of a large matrix product, in floating-point operations (2 a multiply-add) per second.

    The better of PyTorch's GEMM and of a 1x1 convolution: which is better depends on the libraries behind them.
    """
    size = _SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    image = a.view(1, 32, size // 32, size).permute(0, 3, 1, 2)  # channels_last, one pixel per row of a
    kernel = b.view(size, size, 1, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        seconds = min(_best(lambda: a @ b, device), _best(lambda: F.conv2d(image, kernel), device))
    return 2 * size**3 / seconds


def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written per second, copying a block far larger than the caches."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * _COPY_BYTES / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: str) -> float:
    """The shortest of some runs: a ceiling is what is reached when nothing disturbs."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
