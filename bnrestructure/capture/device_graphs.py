"""What records work on a device once and repeats it without Python: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["DeviceGraphs", "graphs_on"]

T = TypeVar("T")


class DeviceGraphs(Protocol):
    """The recorder of one program's work. Its recordings share memory: the backward pass reads what the forward pass keeps."""

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """(what ``work`` returns, what repeats it). Recording computes nothing; each repetition writes to the memory of these results."""

    def is_recording(self) -> bool:
        """Whether somebody records what the calling thread does, a whole training step perhaps."""

    def stream(self) -> Any:
        """What orders the work of the calling thread: recordings that share memory must not be repeated on two of these."""


class CudaGraphs:
    """A :class:`torch.cuda.CUDAGraph` for each recording, in one private pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating and pinning, a data loader's for one: that must not end the capture.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            found = work()
        self._pool = graph.pool()
        return found, graph.replay

    def is_recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def stream(self) -> Any:
        return torch.cuda.current_stream(self._device).cuda_stream


def graphs_on(device: torch.device) -> DeviceGraphs | None:
    """A new recorder for a device, or None where it has no graphs."""
    return CudaGraphs(device) if device.type == "cuda" else None
