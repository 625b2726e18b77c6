"""The short table that benchmarks/gpu ends with."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.schedule import BATCHES, VARIANTS, WARMED

__all__ = ["compare_models", "summarise"]

_OURS = "restructured"
_KINDS = ("fused", "hybrid", "in turn", "unfused")
#: What is aimed at, at the large batch; where nothing else is said, not to be slower.
_SPEED_GOALS = {
    ("models", "densenet121"): "at least 1.6x",
    ("models", "densenet201"): "at least 1.6x",
    ("models", "resnet50"): "at least 1.10x",
    ("models", "mobilenet_v2"): "at least 1.3x",
}
_MEMORY_GOALS = {("models", "densenet121"): "at most 0.35x"}


def summarise(found: dict[str, Any], parts: set[str]) -> list[str]:
    """Print the ceilings, the kernels and the models; return the names of what failed in ``parts``."""
    environment = found.get("environment", {})
    print(f"{environment.get('device', '?')}, torch {environment.get('torch', '?')}, triton {environment.get('triton', '?')}")
    ceilings = found.get("ceilings", {}).get("ceilings", {})
    if ceilings.get("ok"):
        print(f"copies {ceilings['bytes'] / 1e12:.2f} TB/s, multiplies {ceilings['flops'] / 1e12:.0f} TFLOP/s in bf16")
    _kernels(found.get("kernels", {}))
    for part in BATCHES:
        for line in compare_models(part, found.get(part, {})):
            print(line)
    for name, result in found.get("largest batch", {}).items():
        if result.get("ok"):
            print(f"largest batch of {name}: {result['batch']}")
    failed = []
    for part in sorted(parts - {"environment", *WARMED}):
        for name, result in found.get(part, {}).items():
            if not result.get("ok"):
                failed.append(f"{part}: {name} ({result.get('error') or result.get('reason') or 'wrong numbers'})")
    return failed


def _kernels(timed: dict[str, Any]) -> None:
    right = {name: r for name, r in timed.items() if r.get("ok")}
    shares = []
    for name, r in right.items():
        print(f"{name:34} ms: {'; '.join(_ways(r) if 'times' not in r else _sweeps(r))}")
        if "times" in r:
            shares += [(bound / r["times"][kernel], f"{name}: {kernel}") for kernel, bound in r["bounds"].items()]
        else:
            shares += [(r[f"{way}_share"], f"{name} {way}") for way in ("forward", "backward")]
    reasons = [reason for r in right.values() for reason in r.get("not_captured", {}).values()]
    if reasons:
        print(f"* with its launches from Python, as it could not be captured: {reasons[0]}")
    for share, name in sorted(shares)[:3]:
        print(f"furthest from its roofline: {name}, {share:.0%}")


def _ways(r: dict[str, Any]) -> list[str]:
    """A convolution's times forward and backward."""
    ways = []
    for way in ("forward", "backward"):
        pairs = [(kind, f"{kind}_{way}") for kind in _KINDS if r.get(f"{kind}_{way}")]
        times = ", ".join(f"{kind} {r[key]:.3f}{_mark(r, key)}" for kind, key in pairs)
        ways.append(f"{way} {times} (rule: {r[f'{way}_rule']}; bound {r[f'{way}_bound']:.3f})")
    return ways


def _sweeps(r: dict[str, Any]) -> list[str]:
    """The times of the kernels that are no convolution."""
    bounds = {kernel: f" (bound {bound:.3f})" for kernel, bound in r["bounds"].items()}
    return [f"{kernel} {time:.3f}{_mark(r, kernel)}{bounds.get(kernel, '')}" for kernel, time in r["times"].items()]


def _mark(r: dict[str, Any], key: str) -> str:
    return "*" if key in r.get("not_captured", {}) else ""


def compare_models(part: str, timed: dict[str, Any]) -> list[str]:
    """For each model the fastest of its rivals and of ours and their ratio, the memory's, then all of them.

    No ratio unless every rival ran, or ran out of memory: the one that is missing may have been the fastest.
    """
    models: dict[str, dict[str, Any]] = {}
    for unit, r in timed.items():
        name, _, variant = unit.partition(" ")
        models.setdefault(name, {})[variant] = r
    lines = []
    for name, variants in models.items():
        lines.append(f"{part}: {name:16} {_ratio(variants, _SPEED_GOALS.get((part, name)))}")
        if (memory := _memory_ratio(variants, _MEMORY_GOALS.get((part, name)))) is not None:
            lines.append(f"    {memory}")
        lines.append("    " + ", ".join(_variant(variant, r) for variant, r in variants.items()))
    return lines


def _ratio(variants: dict[str, Any], goal: str | None) -> str:
    missing = [v for v in VARIANTS if not v.startswith(_OURS) and not variants.get(v, {}).get("ok")]
    if missing:
        return f"no ratio: incomplete without {', '.join(missing)}"
    times = {v: r["step"] for v, r in variants.items() if r.get("ok") and r.get("step")}
    own = {v: t for v, t in times.items() if v.startswith(_OURS)}
    rivals = {v: t for v, t in times.items() if v not in own}
    if not own or not rivals:
        return f"no ratio: no time of {'the rivals' if own else 'ours'}"
    ours, theirs = min(own, key=lambda v: own[v]), min(rivals, key=lambda v: rivals[v])
    ratio = f"{rivals[theirs] / own[ours]:.2f}x" + (f" (goal: {goal})" if goal else "")
    compared = "" if variants[ours].get("compared") else ", its losses not compared"
    return f"{theirs} {rivals[theirs]:.2f} ms, {ours} {own[ours]:.2f} ms, {ratio}{compared}"


def _memory_ratio(variants: dict[str, Any], goal: str | None) -> str | None:
    """Of the two variants without a graph: what a graph reserves says as much of the allocator as of the step."""
    own, rival = (_peak(variants.get(v, {})) for v in (_OURS, "compile"))
    if not own or not rival:
        return None
    ratio = f"{own / rival:.2f}x" + (f" (goal: {goal})" if goal else "")
    return f"peak memory of torch.compile {rival / 2**30:.2f} GiB, of ours {own / 2**30:.2f} GiB, {ratio}"


def _peak(result: dict[str, Any]) -> int | None:
    """Bytes of tensors at the peak, without those that were there before."""
    return result["allocated"] - result["before"] if result.get("ok") and result.get("step") else None


def _variant(variant: str, result: dict[str, Any]) -> str:
    if not result.get("ok") or not result.get("step"):
        return f"{variant}: {result.get('reason') or result.get('error') or 'failed'}"
    graphed = any(word in variant for word in ("graphed", "captured", "repeated"))
    memory, what = (result["reserved"], "reserved") if graphed else (_peak(result) or 0, "allocated")
    skips = f", its CUDA graphs skipped {result['cudagraph_skips']} times" if graphed and result.get("cudagraph_skips") else ""
    notes = "".join(f", {note}" for note in result.get("graphs", ()))
    return f"{variant} {result['step']:.2f} ms {memory / 2**30:.1f} GiB {what}{skips}{notes}"
