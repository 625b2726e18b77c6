"""Checks and times the CUDA kernels and whole training steps on one NVIDIA GPU: ``python benchmarks/gpu.py``.

    python benchmarks/gpu.py                       every part, in order
    python benchmarks/gpu.py --part models         one part: check, ceilings, kernels, steps, models or batch
    python benchmarks/gpu.py --seconds 540         start nothing new after this long (the default)

Each part is made of units (a kernel at a shape; a model, batch and variant), and each unit's result goes into one
JSON file as soon as it is there: a run that was stopped goes on where it stopped, and says what is left. Every number
is checked against fp64 before it is timed; a configuration whose numbers are wrong gets no time. Exit status: 1 if a
check failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_models import VARIANTS, check_step, largest_batch, time_model
from gpu_nodes import NODES, RAGGED, check_node, check_sweeps, time_node

import bnrestructure
from bnrestructure.bench.ceilings import copy_bandwidth, fma_ceiling
from bnrestructure.kernels import cuda

RESULTS = Path(__file__).parent / "results" / "gpu.json"
MODELS = ("densenet121", "resnet50", "mobilenet_v2", "efficientnet_b0")
BATCHES = (64, 256)
#: Parts whose results another part reads.
REQUIRES = {"kernels": "ceilings", "models": "steps", "batch": "steps"}

Unit = tuple[str, Callable[[], dict[str, Any]]]


def parts(results: dict[str, Any]) -> dict[str, Callable[[], Iterator[Unit]]]:
    """The parts in order; each yields its units. ``results`` is read when a unit runs."""

    def check() -> Iterator[Unit]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for node in (*RAGGED, *NODES):
                yield f"{node.name} {dtype}", lambda node=node, dtype=dtype: check_node(node, dtype)
            for act in ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu(0.1)"):
                yield f"sweeps {act} {dtype}", lambda act=act, dtype=dtype: check_sweeps(act, dtype)

    def ceilings() -> Iterator[Unit]:
        yield (
            "ceilings",
            lambda: {"ok": True, "bytes": copy_bandwidth("cuda"), "flops": fma_ceiling("cuda", torch.bfloat16)},
        )

    def kernels() -> Iterator[Unit]:
        for node in NODES:
            yield node.name, lambda node=node: time_node(node, results["ceilings"]["ceilings"])

    def steps() -> Iterator[Unit]:
        for name in MODELS:
            yield name, lambda name=name: check_step(name)

    def models() -> Iterator[Unit]:
        for batch in reversed(BATCHES):
            for name in MODELS:
                for variant in VARIANTS:
                    yield f"{name} {batch} {variant}", lambda n=name, b=batch, v=variant: _if_right(results, n, v, b)

    def batch() -> Iterator[Unit]:
        for variant in ("eager", "restructured"):
            yield f"densenet121 {variant}", lambda variant=variant: largest_batch("densenet121", variant)

    return {"check": check, "ceilings": ceilings, "kernels": kernels, "steps": steps, "models": models, "batch": batch}


def _if_right(results: dict[str, Any], name: str, variant: str, batch: int) -> dict[str, Any]:
    """A time, unless the restructured model's numbers are wrong."""
    if variant.startswith("restructured") and not results["steps"].get(name, {"ok": False})["ok"]:
        return {"ok": False, "reason": "its numbers are wrong, or were not checked: see the part 'steps'"}
    return time_model(name, batch, variant)


def environment() -> dict[str, Any]:
    """What the results depend on; they are not continued on another device or with other versions."""
    import triton

    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "memory": device.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "bnrestructure": bnrestructure.__version__,
    }


def run(chosen: list[str], path: Path, seconds: float) -> int:
    """Run what is not in the file yet, within the time. Returns the exit status."""
    start, found = time.monotonic(), json.loads(path.read_text()) if path.exists() else {}
    if found.get("environment", environment()) != environment():
        print(
            f"{path} holds results of another device or other versions: name another file with --results",
            file=sys.stderr,
        )
        return 2
    found["environment"] = environment()
    needed = {*chosen, *(before for part, before in REQUIRES.items() if part in chosen)}
    failed, left = [], []
    for part, units in parts(found).items():
        for name, work in units() if part in needed else ():
            results = found.setdefault(part, {})
            if name not in results:
                if time.monotonic() - start > seconds:
                    left.append(f"{part}: {name}")
                    continue
                print(f"{part}: {name}", file=sys.stderr, flush=True)
                results[name] = work()
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
            if not results[name]["ok"]:
                failed.append(f"{part}: {name}")
    summarise(found)
    for what, names in (("wrong", failed), ("left for the next run", left)):
        if names:
            print(f"{len(names)} {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
    return int(bool(failed))


def summarise(found: dict[str, Any]) -> None:
    """A short table of the models, and the kernels furthest from their roofline."""
    timed = {name: r for name, r in found.get("kernels", {}).items() if r["ok"]}
    shares = [(r[f"{way}_share"], f"{name} {way}") for name, r in timed.items() for way in ("forward", "backward")]
    for share, name in sorted(shares)[:3]:
        print(f"furthest from its roofline: {name}, {share:.0%}")
    times = {name: r.get("step") for name, r in found.get("models", {}).items() if r["ok"]}
    for batch in BATCHES:
        for name in MODELS:
            own = [t for v in VARIANTS[4:] if (t := times.get(f"{name} {batch} {v}"))]
            rivals = [t for v in VARIANTS[:4] if (t := times.get(f"{name} {batch} {v}"))]
            if own and rivals:
                ratio = min(rivals) / min(own)
                print(f"{name:16} batch {batch:4}  {min(rivals):8.2f} ms  {min(own):8.2f} ms  {ratio:.2f}x")


def main(arguments: list[str] | None = None) -> int:
    names = ("check", "ceilings", "kernels", "steps", "models", "batch")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", action="append", choices=names, help="may be given several times; every part without it"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help=f"the JSON file (default {RESULTS.name} in results/)"
    )
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this long (default 540)")
    options = parser.parse_args(arguments)
    if (reason := cuda.unavailable_reason()) is not None:
        print(f"The GPU benchmark cannot run here: {reason}.", file=sys.stderr)
        return 2
    return run(options.part or list(names), options.results, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
