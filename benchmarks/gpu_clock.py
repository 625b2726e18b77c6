"""The clock of benchmarks/gpu.py for single kernels: the GPU's time, without that of the Python around the launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from gpu_memory import is_out_of_memory

from bnrestructure.kernels import tuning

__all__ = ["Clock", "clock_for", "convolutions_chosen"]

#: Written before each run: more than any second-level cache holds, several times over, so that the host gets ahead meanwhile.
_FLUSHED_BYTES, _FLUSHES = 2**28, 2
_RUNS = 25


class Clock:
    """Times work on a stream of its own. What autograd is to run backward must have been run forward within :meth:`stream`.

    ``not_captured`` says of each piece of work whose launches could not be captured why: its time is that of its launches, too.
    """

    def __init__(self) -> None:
        self.not_captured: dict[str, str] = {}
        self._stream = torch.cuda.Stream()
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def stream(self) -> AbstractContextManager[Any]:
        """Where to prepare what is timed; all other streams' work is done."""
        torch.cuda.synchronize()
        return torch.cuda.stream(self._stream)

    def milliseconds(self, name: str, work: Callable[[], object]) -> float:
        """Median of some replays of a CUDA graph of the work, between events, the caches flushed before each."""
        with self.stream():
            for _ in range(3):  # compiles, and lets cuDNN choose
                work()
            torch.cuda.synchronize()
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self._stream):
                    kept = work()
                run: Callable[[], object] = graph.replay
            except Exception as error:  # whatever a capture forbids: the same work is timed launch by launch, and says so
                if is_out_of_memory(error):
                    raise
                torch.cuda.synchronize()  # an error that stays would come up here
                kept, run = None, work
                self.not_captured[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            run()
            pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(_RUNS)]
            for start, end in pairs:
                for _ in range(_FLUSHES):
                    self._flushed.zero_()
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
            del kept  # the graph writes to it
        return median(start.elapsed_time(end) for start, end in pairs)


class _HostClock:
    """The same for a dry run on the CPU: a single run, by the host's clock."""

    def __init__(self) -> None:
        self.not_captured: dict[str, str] = {}

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def milliseconds(self, name: str, work: Callable[[], object]) -> float:
        return tuning.wall_clock(work)


def clock_for(device: str) -> Clock | _HostClock:
    """The clock of a device."""
    return _HostClock() if device == "cpu" else Clock()


@contextmanager
def convolutions_chosen() -> Iterator[None]:
    """cuDNN picks its algorithms by timing some: for every variant, as a user who wants speed would have it."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before
