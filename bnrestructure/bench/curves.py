"""Memory over one training step: what PyTorch's allocator holds at each moment, from the profiler's record of its calls."""

from __future__ import annotations

import os
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from bnrestructure.bench.workload import TrainingStep

__all__ = ["PHASES", "memory_curve", "thinned"]

# The profiler's library writes of every start and stop to stderr, and of a GPU that is not there.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

PHASES = ("forward", "backward")
_POINTS = 400


def memory_curve(step: TrainingStep) -> list[tuple[float, int]]:
    """(place, bytes) through one step: place 0 to 1 is the forward pass, 1 to 2 the backward pass, by the clock within each.

    Bytes are what was allocated since the step began and not freed, gradients of the parameters among them, the model and its input
    not. Scratch memory that kernels keep outside of PyTorch's allocator is not seen. Some steps must have been run before: what a
    first one makes and keeps (captured graphs, packed weights) is not the step's.
    """
    cuda = step.device == "cuda"
    step.model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], profile_memory=True) as profiler:
        with record_function(_mark("forward")):
            loss = step.forward()
        with record_function(_mark("backward")):
            loss.backward()
    events = _events(profiler)
    spans = {event.name(): (event.start_ns(), event.duration_ns()) for event in events}
    calls = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and (event.device_type().name == "CUDA") == cuda
    )
    held = accumulate(size for _, size in calls)
    start, length = zip(*(spans[_mark(phase)] for phase in PHASES), strict=True)

    def place(at: int) -> float:
        phase = int(at >= start[1])
        return phase + min(1.0, max(0.0, (at - start[phase]) / length[phase]))

    return thinned([(place(at), size) for (at, _), size in zip(calls, held, strict=True)])


def thinned(curve: list[tuple[float, int]], points: int = _POINTS) -> list[tuple[float, int]]:
    """The curve with about ``points`` points: the highest and the last of each stretch, so that no peak is lost."""
    width = -(-len(curve) // max(1, points // 2))
    if width <= 2:
        return curve
    kept = []
    for i in range(0, len(curve), width):
        stretch = curve[i : i + width]
        highest = max(stretch, key=lambda point: point[1])
        kept += [highest] if highest is stretch[-1] else [highest, stretch[-1]]
    return kept


def _mark(phase: str) -> str:
    return f"bnrestructure.bench {phase}"


def _events(profiler: Any) -> list[Any]:
    """Every event with the allocator's calls among them, which profiler.events() adds up by operation."""
    return list(profiler.profiler.kineto_results.events())
