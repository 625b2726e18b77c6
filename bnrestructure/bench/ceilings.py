"""What the machine can do at best: multiply-adds a second, and bytes copied a second, measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["copy_bandwidth", "fma_ceiling"]

#: Of the square matrices: the first that is tried, and the last.
_SIZES = {"cpu": (256, 2048), "cuda": (8192, 8192)}
#: Larger ones are tried while they take no longer. A CPU without instructions for bfloat16 multiplies it a hundred times as slowly.
_LONGEST_SECONDS = 0.3
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_REPEATS = 5
#: On a GPU: runs in a row, an event between each two, once this many seconds of work have raised its clock from idle.
_GPU_REPEATS, _GPU_WARM_UP = 20, 0.2


def fma_ceiling(device: str, dtype: torch.dtype) -> float:
    """The highest rate of a large matrix product, in floating-point operations (2 a multiply-add) per second.

    The better of PyTorch's GEMM and of a 1x1 convolution: which is better depends on the libraries behind them.
    """
    return max(_rate(product, device, dtype) for product in (_gemm, _convolution))


def _rate(product: Callable[[Tensor, Tensor], Callable[[], object]], device: str, dtype: torch.dtype) -> float:
    """Operations per second, of the largest size that is tried."""
    size, largest = _SIZES[device]
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with torch.no_grad():
            seconds = _best(product(a, b), device)
        if size == largest or 2**3 * seconds > _LONGEST_SECONDS:
            return 2 * size**3 / seconds
        size *= 2


def _gemm(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: a @ b


def _convolution(a: Tensor, b: Tensor) -> Callable[[], object]:
    size = len(a)
    image = a.view(1, 32, size // 32, size).permute(0, 3, 1, 2)  # channels_last, one pixel per row of a
    kernel = b.view(size, size, 1, 1).contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(image, kernel)


def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written per second, copying a block far larger than the caches."""
    size = _COPY_BYTES[device]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: str) -> float:
    """The shortest of some runs, in seconds: a ceiling is what is reached when nothing disturbs."""
    return _best_on_gpu(work) if device == "cuda" else _best_on_cpu(work)


def _best_on_cpu(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _best_on_gpu(work: Callable[[], object]) -> float:
    """By the device's own clock: the host's holds the launch and the wait, which last as long as a small copy."""
    warm = time.perf_counter() + _GPU_WARM_UP
    while time.perf_counter() < warm:
        work()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_GPU_REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in pairwise(events)) / 1e3
