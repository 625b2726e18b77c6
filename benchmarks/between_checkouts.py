"""Two checkouts of this repository in one process, their training steps in turns: ``python benchmarks/between_checkouts.py OLD NEW``.

Each checkout needs its kernels built (python bnrestructure/kernels/cpu/build.py there). Prints, for each model and dtype, the medians of
both and the median of old / new paired by round, with its 95 % interval (by the binomial of the rounds' order, no distribution supposed):
above 1 the new one is faster. With --explain NAME the time of restructure(), of explain() and of the first step. glibc's allocator is as
the environment says. A checkout against itself says how much of a ratio is noise that more rounds do not take away.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.checkout import Folders

#: (model, images, size, timed rounds, rounds before them): a small one, where Python takes most of the time, and three usual ones.
CASES = (("resnet18", 8, 32, 200, 20), ("mobilenet_v2", 16, 224, 12, 3), ("resnet50", 16, 224, 12, 3), ("densenet121", 16, 224, 12, 3))


class Version:
    """One checkout; within ``with version as bnrestructure`` its modules are those that are imported."""

    def __init__(self, root: Path) -> None:
        self._finder = Folders(root)
        self._modules: dict[str, ModuleType] = {}

    def __enter__(self) -> Any:
        for name in _ours():
            del sys.modules[name]
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self._finder)
        return importlib.import_module("bnrestructure")

    def __exit__(self, *_: object) -> None:
        self._modules = {name: sys.modules[name] for name in _ours()}
        sys.meta_path.remove(self._finder)


def _ours() -> list[str]:
    return [name for name in sys.modules if name == "bnrestructure" or name.startswith("bnrestructure.")]


def in_turns(versions: dict[str, Version], run: Callable[[str, Any], Any], rounds: int, warm: int = 0) -> dict[str, list[Any]]:
    """What ``run(name, the package)`` gives for both, round by round, the first of a round changing."""
    found: dict[str, list[Any]] = {name: [] for name in versions}
    for number in range(warm + rounds):
        for name in (list(versions) if number % 2 else list(versions)[::-1]):
            with versions[name] as package:
                result = run(name, package)
            if number >= warm:
                found[name].append(result)
    return found


def step(model: nn.Module, x: Tensor, dtype: str) -> float:
    """Seconds of a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = model(x).float().square().mean()
    loss.backward()
    return time.perf_counter() - began


def median_interval(values: list[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics, equally far from both ends, that holds the median in 95 of 100 samples or more."""
    n, ordered = len(values), sorted(values)
    outside = 0.0
    for rank in range(n // 2):
        outside += 2 * math.comb(n, rank) / 2**n
        if outside > 0.05:
            return ordered[max(rank - 1, 0)], ordered[-max(rank, 1)]
    return ordered[0], ordered[-1]


def compare(versions: dict[str, Version], case: tuple[str, int, int, int, int], dtype: str, times_rounds: int = 1) -> str:
    """A line for one model and dtype."""
    name, batch, size, rounds, warm = case
    rounds *= times_rounds
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    models = {}
    for which, version in versions.items():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        with version as package:
            models[which] = package.restructure(model)
    times = in_turns(versions, lambda which, _: step(models[which], x, dtype), rounds, warm)
    old, new = times.values()
    ratios = [a / b for a, b in zip(old, new, strict=True)]
    low, high = median_interval(ratios)
    both = f"{statistics.median(old) * 1e3:.1f} -> {statistics.median(new) * 1e3:.1f} ms"
    ratio = f"old / new {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}], {rounds} rounds"
    return f"{name} {size}x{size} batch {batch} {dtype}: {both}, {ratio}"


def explained(versions: dict[str, Version], name: str, rounds: int = 5) -> str:
    """A line with the medians of restructure(), explain() and the first step, old -> new."""

    def run(_: str, package: Any) -> list[float]:
        model, x = torchvision.models.get_model(name, weights=None).train(), torch.randn(2, 3, 64, 64)
        marks = [time.perf_counter()]
        for work in (lambda: package.restructure(model), lambda: package.explain(model, x), lambda: model(x).sum().backward()):
            work()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]

    old, new = ([statistics.median(kind) * 1e3 for kind in zip(*times, strict=True)] for times in in_turns(versions, run, rounds).values())
    kinds = zip(("restructure()", "explain()", "first step"), old, new, strict=True)
    return f"{name}: " + ", ".join(f"{kind} {a:.0f} -> {b:.0f} ms" for kind, a, b in kinds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--models", nargs="*", default=[case[0] for case in CASES], choices=[case[0] for case in CASES])
    parser.add_argument("--times-rounds", type=int, default=1, metavar="N", help="N times as many rounds")
    parser.add_argument("--explain", metavar="NAME", help="a torchvision model")
    options = parser.parse_args()
    versions = {"old": Version(options.old.resolve()), "new": Version(options.new.resolve())}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.old} -> {options.new}")
    for case in CASES:
        for dtype in ("fp32", "bf16") if case[0] in options.models else ():
            print(compare(versions, case, dtype, options.times_rounds), flush=True)
    if options.explain:
        print(explained(versions, options.explain), flush=True)


if __name__ == "__main__":
    main()
