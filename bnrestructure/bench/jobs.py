"""The measurements, one function each: a job runs in a process of its own (``worker.py``) and returns plain data."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bnrestructure.api import explain
from bnrestructure.bench import contenders
from bnrestructure.bench.ceilings import copy_bandwidth, fma_ceiling
from bnrestructure.bench.check import check_numbers
from bnrestructure.bench.contenders import COMPILED, EAGER_LAST, RESTRUCTURED
from bnrestructure.bench.curves import memory_curve
from bnrestructure.bench.kinds import time_by_kind
from bnrestructure.bench.loading import load_workload
from bnrestructure.bench.machine import environment
from bnrestructure.bench.paired import time_paired
from bnrestructure.bench.resident import peak_growth
from bnrestructure.bench.settings import MALLOC, Settings
from bnrestructure.bench.workload import TrainingStep, Workload
from bnrestructure.core.memory_format import to_channels_last
from bnrestructure.kernels import registry, tuning
from bnrestructure.plan.shapes import Observed
from bnrestructure.report.memory import saved_for_backward

__all__ = ["JOBS", "Progress"]

_CHECKED_BATCH = 2
_MEMORY_STEPS = 2


class Progress:
    """How far a job is: ``send`` takes {"total": runs} once and {"run": name} before each run, the check's a step's seconds first."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send

    def total(self, runs: int) -> None:
        """How many runs the job has."""
        self._send({"total": runs})

    def run(self, name: str) -> None:
        """A run begins."""
        self._send({"run": name})

    def step(self, seconds: float, batch: int, memory_efficient: bool) -> None:
        """What is known of the work to come once an eager step of ``batch`` samples was taken."""
        self._send({"step_seconds": seconds, "batch": batch, "memory_efficient": memory_efficient})


def check(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Whether what would be timed computes the right numbers, on a batch of two of the same images.

    It is the first of the jobs. Raises UsageError for a model that does not take the inputs.
    """
    workload = load_workload(settings)
    Observed(workload.model, workload.first(2)).check()
    batch = min(_CHECKED_BATCH, settings.batch)
    small = Workload(workload.model, workload.first(batch))
    step = contenders.build(EAGER_LAST, small, settings)
    step()
    progress.step(step()["step"], batch, contenders.has_memory_efficient(workload))
    model = workload.model.to(settings.device)
    model, inputs = to_channels_last(model, contenders.moved(workload.first(_CHECKED_BATCH), settings.device))
    selections: dict[str, str | None] = {RESTRUCTURED: None}
    selections |= {name: rung for rung, name in contenders.rungs(settings).items() if name != RESTRUCTURED}
    progress.total(len(selections))
    reports = {}
    for name, passes in selections.items():
        progress.run(name)
        report = check_numbers(model, inputs, settings, passes)
        reports[name] = report.to_json() | {"text": str(report)}
    return {
        "ok": all(report["ok"] for report in reports.values()),
        "batch": batch,
        "reports": reports,
    }


def ceilings(settings: Settings, progress: Progress) -> dict[str, Any]:
    """The machine's ceilings, and what a step of this model needs of each."""
    progress.total(4)
    found: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        progress.run(f"{name} multiply-adds")
        found[f"{name}_flops_per_second"] = fma_ceiling(settings.device, dtype)
    progress.run("copy bandwidth")
    found["copy_bytes_per_second"] = copy_bandwidth(settings.device)
    progress.run("operations of a step")
    workload = load_workload(settings)
    with FlopCounterMode(display=False) as counter:
        contenders.build(EAGER_LAST, workload, settings)()
    found["step_flops"] = counter.get_total_flops()
    return found | {"plan": _sweeps(workload, settings), "environment": environment(settings.device)}


def _sweeps(workload: Workload, settings: Settings) -> dict[str, Any]:
    """How many sites each selection of passes fuses, and the bytes that their sweeps move in a step."""
    selections: dict[str, str | None] = {RESTRUCTURED: None} | {r: r for r in contenders.rungs(settings)}
    found: dict[str, dict[str, Any]] = {}
    for name, passes in selections.items():
        plan = explain(workload.model, workload.inputs, backend=settings.backend, passes=passes)
        sites = [site for site in plan.sites if site.bytes_before is not None and site.bytes_after is not None]
        # Shapes are worked out without autocast; with it, what convolutions hand to batch norms is half as wide.
        width = 0.5 if settings.dtype == "bf16" else 1.0
        found[name] = {
            "sites": len(plan.sites),
            **plan.counts,
            "bytes_before": round(width * sum(site.bytes_before or 0 for site in sites)),
            "bytes_after": round(width * sum(site.bytes_after or 0 for site in sites)),
        }
        if name == RESTRUCTURED:
            found[name]["by_site"] = [
                [site.name, round(width * (site.bytes_before or 0)), round(width * (site.bytes_after or 0))] for site in sites
            ]
    return found


def timing(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Seconds of every contender, round by round; time by kind of operation of the eager and the restructured model."""
    workload = load_workload(settings)
    names = contenders.contenders(settings, contenders.has_memory_efficient(workload))
    profiled = [name for name in (EAGER_LAST, RESTRUCTURED) if name in names]
    progress.total(len(names) * (settings.warmup + settings.rounds) + len(profiled))
    steps = {name: contenders.build(name, workload, settings) for name in names}
    if settings.tune:
        tune_kernels(steps[RESTRUCTURED])
    timings = time_paired(steps, rounds=settings.rounds, warmup=settings.warmup, progress=progress.run)
    kinds = {}
    for name in profiled:
        progress.run(f"profile of {name}")
        kinds[name] = time_by_kind(steps[name], settings.device)
    environment_seen = {name: os.environ[name] for tuned in MALLOC.values() for name in tuned if name in os.environ}
    return {
        "samples": timings.samples,
        "kinds": kinds,
        "notes": _notes(settings),
        "malloc_environment": environment_seen,
    }


def tune_kernels(step: TrainingStep) -> None:
    """Measure the candidate kernels within a step, under the very allocator that the timing has."""
    with tuning.measuring():
        step()


def _notes(settings: Settings) -> list[str]:
    """What a reader of the figures must know about this installation."""
    if settings.backend == "reference":
        return ["the reference kernels were asked for: they are plain PyTorch and not made to be fast"]
    reason = registry.unavailable_reason(settings.device)
    return [] if reason is None else [f"the slow reference kernels were timed: {reason}"]


def memory(settings: Settings, progress: Progress, variant: str) -> dict[str, Any]:
    """Peak memory of a variant's first steps, and what autograd keeps for backward in one. Only for a fresh process."""
    progress.total(_MEMORY_STEPS + 1)
    step = contenders.build(variant, load_workload(settings), settings)

    def steps() -> None:
        for _ in range(_MEMORY_STEPS):
            progress.run(f"peak memory of {variant}")
            step()

    peak = peak_growth(steps, settings.device)
    progress.run(f"saved tensors of {variant}")
    return {"peak_bytes": peak, "saved_bytes": saved_for_backward(step.model, step)}


def curve(settings: Settings, progress: Progress, variant: str) -> dict[str, Any]:
    """Memory over one step of a variant, after steps that make what is made once."""
    progress.total(_MEMORY_STEPS + 1)
    step = contenders.build(variant, load_workload(settings), settings)
    for _ in range(_MEMORY_STEPS):
        progress.run(f"warm-up of {variant}")
        step()
    progress.run(f"memory over a step of {variant}")
    return {"curve": memory_curve(step)}


def compilation(settings: Settings, progress: Progress, variant: str = COMPILED) -> dict[str, Any]:
    """Compile with torch.compile, which leaves the model in the compiler's cache on disk; how long that took."""
    progress.total(1)
    progress.run("compiling (minutes)")
    step = contenders.build(variant, load_workload(settings), settings)
    start = time.perf_counter()
    step()
    return {"seconds": time.perf_counter() - start}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job for job in (check, ceilings, timing, memory, curve, compilation)
}
