"""Where a step's time goes: PyTorch's profiler, summed by kind of operation, forward and backward apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["KINDS", "time_by_kind"]

#: Kinds in the order of tables and pictures: of eager models, then the fused nodes, then the rest.
KINDS = (
    "conv", "BN", "activation", "add/cat", "pool",
    "fused conv", "statistics", "finalize", "normalise", "residual", "fused pool",
    "other",
)  # fmt: skip

# The first pattern that matches an event's whole name gives the kind of everything under it. Autograd functions carry
# their class's name, their backward that name and "Backward"; ATen's backward nodes end in "Backward0".
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("fused conv", r"PlainConv|JoinConv"),
    ("statistics", r"_Statistics"),
    ("finalize", r"_Finalize"),
    ("normalise", r"_Normalise"),
    ("residual", r"_Residual"),
    ("fused pool", r"_MaxPool|_AvgPool|_Squeeze"),
    ("add/cat", r"_ConcatBuffer|_OwnGradient"),
    ("conv", r"aten::conv\w*|Convolution|Mkldnn\w*Conv\w*"),
    ("BN", r"aten::(batch_norm|_batch_norm\w*|native_batch_norm\w*)|NativeBatchNorm|CudnnBatchNorm|BatchNorm\w*"),
    ("activation", r"aten::(relu|relu6|hardtanh|silu|hardswish|hardsigmoid|sigmoid|gelu|leaky_relu|clamp\w*)_?"),
    ("activation", r"Relu|Hardtanh|Silu|Hardswish|Hardsigmoid|Sigmoid|Gelu|LeakyRelu|Clamp\w*"),
    ("add/cat", r"aten::(add|cat|concat)_?|Add|Cat"),
    ("pool", r"aten::(\w*pool2d\w*|\w*pool3d\w*|mean)|\w*Pool[23][dD]\w*|Mean\w*"),
)
_COMPILED = tuple((kind, re.compile(rf"(?:{pattern})(?:Backward\d*)?")) for kind, pattern in _PATTERNS)
_BACKWARD = "autograd::engine::evaluate_function: "


def time_by_kind(step: Callable[[], Any], device: str, steps: int = 2) -> dict[str, dict[str, float]]:
    """``{kind: {"forward": seconds, "backward": seconds}}`` of one call of ``step``, the mean over ``steps`` calls.

    The profiler itself costs some microseconds an operation, so the sum is a little above an unprofiled step.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
    events = profiler.events() or []
    totals: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event in events:
        if event.cpu_parent is None and event.device_type.name == "CPU":
            _add(totals, event, device, "backward" if event.name.startswith(_BACKWARD) else "forward")
    return {kind: {phase: s / steps for phase, s in totals[kind].items()} for kind in KINDS if kind in totals}


def kind_of(name: str) -> str | None:
    """The kind of an event by its name; None where only the events inside it can tell."""
    return next((kind for kind, pattern in _COMPILED if pattern.fullmatch(name)), None)


def _add(totals: dict[str, dict[str, float]], event: Any, device: str, phase: str) -> None:
    """Give the whole of an event to its kind, or to its children what is theirs and the rest to ``other``."""
    kind = kind_of(event.name)
    whole = _seconds(event, device)
    if kind is None:
        children = list(event.cpu_children)
        for child in children:
            _add(totals, child, device, phase)
        kind, whole = "other", whole - sum(_seconds(child, device) for child in children)
    totals[kind][phase] += max(whole, 0.0)


def _seconds(event: Any, device: str) -> float:
    return (event.device_time_total if device == "cuda" else event.cpu_time_total) * 1e-6


def total(kinds: Iterable[dict[str, float]]) -> float:
    """The seconds of all of these together."""
    return sum(sum(phases.values()) for phases in kinds)
