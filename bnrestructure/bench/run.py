"""A benchmark from its settings to its figures: check, ceilings, then time and memory for each allocator setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Protocol

from bnrestructure.bench.contenders import (
    COMPILED,
    EAGER_LAST,
    MEMORY_EFFICIENT,
    RESTRUCTURED,
    RIVALS,
    compiles,
    contenders,
    drawn,
    rungs,
)
from bnrestructure.bench.machine import command_line
from bnrestructure.bench.paired import PairedTimings
from bnrestructure.bench.process import JobFailedError, run_job
from bnrestructure.bench.rivals import missing_reason
from bnrestructure.bench.settings import Settings

__all__ = ["PHASES", "Listener", "run_benchmark"]

PHASES = ("forward", "backward", "step")


class Listener(Protocol):
    """Is told of each job by a title, and gets a function that takes what ``jobs.Progress`` sends."""

    def __call__(self, title: str) -> Callable[[dict[str, Any]], None]: ...


def run_benchmark(settings: Settings, listener: Listener) -> dict[str, Any]:
    """All figures as plain data. With wrong numbers (``result["check"]["ok"]`` false) nothing is timed: no sections.

    Raises UsageError for a model that cannot be loaded or trained on, JobFailedError when a measuring process dies.
    """
    result: dict[str, Any] = {"command": command_line(), "settings": asdict(settings), "notes": []}
    first = settings.malloc[-1]
    result["check"] = run_job("check", settings, malloc=first, listen=listener("checking the numbers"))
    if not result["check"]["ok"]:
        return result
    found = run_job("ceilings", settings, malloc=first, listen=listener("the machine's ceilings"))
    result["environment"], result["plan"] = found.pop("environment"), found.pop("plan")
    result["ceilings"] = found
    settings = _compiled(_present(settings, result), result, listener)
    result["sections"] = [_section(settings, malloc, result, listener) for malloc in settings.malloc]
    if settings.curves:
        result["curves"] = _curves(settings, result, listener)
    return result


def _present(settings: Settings, result: dict[str, Any]) -> Settings:
    """Without the rivals that cannot be had here; a note says why."""
    reasons = {name: missing_reason(name, settings.dtype) for name in settings.rivals}
    result["notes"] += [f"{name} was not timed: {reason}" for name, reason in reasons.items() if reason is not None]
    return replace(settings, rivals=tuple(name for name, reason in reasons.items() if reason is None))


def _compiled(settings: Settings, result: dict[str, Any], listener: Listener) -> Settings:
    """Fill the compiler's cache. What fails there or takes long is no contender, and a note says so."""
    for name in [*([COMPILED] if settings.compile else []), *filter(compiles, settings.rivals)]:
        try:
            listen = listener(name)
            done = run_job("compilation", settings, limit=settings.compile_limit, listen=listen, variant=name)
        except JobFailedError as error:
            result["notes"].append(f"{name} was not timed: {error}")
            rivals = tuple(rival for rival in settings.rivals if rival != name)
            settings = replace(settings, compile=settings.compile and name != COMPILED, rivals=rivals)
        else:
            if name == COMPILED:
                result["compile_seconds"] = done["seconds"]
    return settings


def _curves(settings: Settings, result: dict[str, Any], listener: Listener) -> dict[str, list[tuple[float, int]]]:
    """Memory over one step; with the allocator's setting it has nothing to do."""
    found = {}
    for name in drawn(settings, MEMORY_EFFICIENT in result["sections"][0]["variants"]):
        malloc = settings.malloc[0]
        found[name] = run_job("curve", settings, malloc=malloc, listen=listener("memory over a step"), variant=name)["curve"]
        for section in result["sections"]:
            section["variants"][name]["held_bytes"] = max(size for _, size in found[name])
    return found


def _section(settings: Settings, malloc: str, result: dict[str, Any], listener: Listener) -> dict[str, Any]:
    """Everything that was measured under one allocator setting."""
    measured = run_job("timing", settings, malloc=malloc, listen=listener(f"timing, {malloc} malloc"))
    timings = PairedTimings(measured["samples"])
    variants: dict[str, dict[str, Any]] = {}
    for name in timings.samples:
        variants[name] = {phase: asdict(timings.spread(name, phase)) for phase in PHASES}
    if settings.memory:
        for name in contenders(settings, MEMORY_EFFICIENT in variants):
            # What torch.compile holds while it compiles is most of such a process: no figure of a training step.
            if not compiles(name):
                variants[name] |= run_job(
                    "memory", settings, malloc=malloc, listen=listener(f"memory, {malloc} malloc"), variant=name
                )
    result["notes"] += [note for note in measured["notes"] if note not in result["notes"]]
    return {
        "malloc": malloc,
        "malloc_environment": measured["malloc_environment"],
        "variants": variants,
        "comparison": _compare(timings, variants),
        "speedups": _speedups(timings),
        "ladder": {rung: name for rung, name in rungs(settings).items() if name in variants},
        "kinds": measured["kinds"],
        "samples": timings.samples,
    }


def _compare(timings: PairedTimings, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Restructured beside the fastest of its rivals, both sides of every ratio; memory beside eager channels_last."""
    rival = timings.fastest(name for name in RIVALS if name in timings.samples)
    compared: dict[str, Any] = {"against": rival, "memory_against": EAGER_LAST}
    for phase in PHASES:
        compared[phase] = {
            "theirs": timings.spread(rival, phase).median,
            "ours": timings.spread(RESTRUCTURED, phase).median,
            "ratio": asdict(timings.ratio(rival, RESTRUCTURED, phase)),
        }
    for figure in ("saved_bytes", "peak_bytes"):
        theirs, ours = variants[EAGER_LAST].get(figure), variants[RESTRUCTURED].get(figure)
        if theirs is not None and ours is not None:
            compared[figure] = {"theirs": theirs, "ours": ours, "ratio": ours / theirs if theirs else None}
    return compared


def _speedups(timings: PairedTimings) -> dict[str, dict[str, float]]:
    """Paired ratio of each other variant's step to the restructured model's: above 1, restructured is faster."""
    return {name: asdict(timings.ratio(name, RESTRUCTURED)) for name in timings.samples if name != RESTRUCTURED}
