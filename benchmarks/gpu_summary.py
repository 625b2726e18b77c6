"""The short table that benchmarks/gpu.py ends with."""

from __future__ import annotations

from typing import Any

__all__ = ["summarise"]

_OURS = "restructured"
_KINDS = ("fused", "hybrid", "in turn", "unfused")


def summarise(found: dict[str, Any], parts: set[str]) -> list[str]:
    """Print the ceilings, the kernels and the models; return the names of what failed in ``parts``."""
    environment = found.get("environment", {})
    print(f"{environment.get('device', '?')}, torch {environment.get('torch', '?')}, triton {environment.get('triton', '?')}")
    ceilings = found.get("ceilings", {}).get("ceilings", {})
    if ceilings.get("ok"):
        print(f"copies {ceilings['bytes'] / 1e12:.2f} TB/s, multiplies {ceilings['flops'] / 1e12:.0f} TFLOP/s in bf16")
    _kernels(found.get("kernels", {}))
    for part in ("models", "models of batch 64"):
        _models(part, found.get(part, {}))
    for name, result in found.get("largest batch", {}).items():
        if result.get("ok"):
            print(f"largest batch of {name}: {result['batch']}")
    failed = []
    for part in sorted(parts):
        units = {} if part == "environment" else found.get(part, {})
        for name, result in units.items():
            # What could not be compiled side by side is compiled, or fails, where it is timed.
            if not result.get("ok") and part != "warm":
                failed.append(f"{part}: {name} ({result.get('error') or result.get('reason') or 'wrong numbers'})")
    return failed


def _kernels(timed: dict[str, Any]) -> None:
    right = {name: r for name, r in timed.items() if r.get("ok")}
    for name, r in right.items():
        ways = []
        for way in ("forward", "backward"):
            times = ", ".join(f"{kind} {r[f'{kind}_{way}']:.3f}" for kind in _KINDS if r.get(f"{kind}_{way}"))
            ways.append(f"{way} {times} (rule: {r[f'{way}_rule']}; bound {r[f'{way}_bound']:.3f})")
        print(f"{name:34} ms: {'; '.join(ways)}")
    shares = sorted((r[f"{way}_share"], f"{name} {way}") for name, r in right.items() for way in ("forward", "backward"))
    for share, name in shares[:3]:
        print(f"furthest from its roofline: {name}, {share:.0%}")


def _models(part: str, timed: dict[str, Any]) -> None:
    """For each model the fastest of its rivals and of ours, then all of them."""
    times: dict[str, dict[str, Any]] = {}
    for unit, r in timed.items():
        name, _, variant = unit.partition(" ")
        if r.get("ok") and r.get("step"):
            times.setdefault(name, {})[variant] = r
    for name, variants in times.items():
        own = {v: r["step"] for v, r in variants.items() if v.startswith(_OURS)}
        rivals = {v: r["step"] for v, r in variants.items() if not v.startswith(_OURS)}
        if own and rivals:
            ours, theirs = min(own, key=lambda v: own[v]), min(rivals, key=lambda v: rivals[v])
            ratio = rivals[theirs] / own[ours]
            print(f"{part}: {name:16} {theirs} {rivals[theirs]:.2f} ms, {ours} {own[ours]:.2f} ms, {ratio:.2f}x")
        memory = ", ".join(f"{v} {r['step']:.2f} ms {r['reserved'] / 2**30:.1f} GiB" for v, r in variants.items())
        print(f"    {memory}")
