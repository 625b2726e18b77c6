"""Checks the rule of kernels/cpu/rule.py: every candidate for convolution nodes of no model in particular.

    python benchmarks/convolution_grid.py [PATTERN] [--bf16] [--groups] [--batch 16] [--turns 9]

A node's candidates run in turns, after their numbers were checked, each on data that has left the cache, as a training step's
has. The last lines add up what the rule's choices take, what the best would, and what the fused kernels alone would.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from convolution_case import Case, Node
from torch import Tensor

from bnrestructure.kernels.choice import Node as ChoiceNode
from bnrestructure.kernels.cpu import KERNELS, processor
from bnrestructure.kernels.cpu.rule import CpuRule, instruction_set, rule


def grid(batch: int) -> Iterator[Node]:
    """Kernels, strides, sizes and channels crossed, those of 0.3 to 12 GFLOP; and a few whose outputs outgrow any cache."""
    for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1)):
        for size in (40, 20, 9, 6):
            for channels in (48, 160, 320, 640, 1280):
                for channels_out in (channels // 4, channels, 4 * channels if kernel == 1 else channels // 2):
                    out = (size - 1) // stride + 1
                    if 0.3e9 < 2 * batch * out**2 * channels * channels_out * kernel**2 < 12e9:
                        yield _node(kernel, stride, size, channels, channels_out)
    for kernel, size, channels, channels_out in ((3, 150, 32, 64), (3, 120, 48, 96), (3, 110, 96, 96), (3, 60, 160, 240), (5, 110, 32, 80)):
        yield _node(kernel, 1, size, channels, channels_out)


def grid_in_groups() -> Iterator[Node]:
    """3x3 kernels in groups of 4 to 48 channels, some of which fill vectors and matrix tiles and some of which do not."""
    for groups, each, size in (
        (32, 4, 56), (32, 8, 28), (32, 16, 14), (32, 32, 7), (8, 8, 56), (13, 8, 28), (13, 16, 28), (7, 24, 28), (6, 40, 28), (7, 48, 14)
    ):  # fmt: skip
        yield _node(3, 1, size, groups * each, groups * each, groups)
    yield _node(3, 2, 56, 256, 256, 32)


def _node(kernel: int, stride: int, size: int, channels: int, channels_out: int, groups: int = 1) -> Node:
    name = f"{kernel}x{kernel}/{stride} {channels}->{channels_out} at {size}" + (f" in {groups}" if groups > 1 else "")
    return Node(name, channels, channels_out, size, kernel, stride, groups)


def runs_of(case: Case, sizes: ChoiceNode) -> dict[str, dict[str, Callable[[], Any]]]:
    """What each direction could run. Raises AssertionError where a candidate's numbers are wrong."""
    names = {direction: CpuRule().candidates(sizes, direction) for direction in ("forward", "backward")}
    forward = {name: case.forward(KERNELS.convolutions.by(name).run) for name in names["forward"]}
    backward = {name: case.backward(KERNELS.convolutions.by(name).run) for name in names["backward"]}
    case.check([*forward.values()], [*backward.values()])
    return {"forward": forward, "backward": backward}


def medians(runs: dict[str, Callable[[], Any]], turns: int, evict: Tensor) -> dict[str, float]:
    """Median milliseconds of each over ``turns``, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            evict.sum()
            begin = time.perf_counter()
            run()
            if turn:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help='regular expression, for lines like "3x3/2 160->80 at 40"')
    parser.add_argument("--bf16", action="store_true", help="bfloat16 activations")
    parser.add_argument("--groups", action="store_true", help="convolutions in groups instead")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    isa, threads = instruction_set(), torch.get_num_threads()
    print(f"python {shlex.join(sys.argv)}: {processor.name()}, {isa}, {threads} threads, {dtype}, PyTorch {torch.__version__}, "
          f"Python {platform.python_version()}")  # fmt: skip
    print("milliseconds; backward: fused, hybrid, fused dgrad with hybrid wgrad, hybrid dgrad with fused wgrad; "
          "last, of 3x3/1 in float32, winograd; * is the rule's choice")  # fmt: skip
    evict = torch.ones(32 << 20)  # 128 MB
    totals: dict[str, list[float]] = {"forward": [0.0] * 3, "backward": [0.0] * 3}
    worst: list[tuple[float, str]] = []
    for node in grid_in_groups() if options.groups else grid(options.batch):
        if not re.search(options.pattern, node.name):
            continue
        line = f"{node.name:26}"
        case = Case(node, options.batch, dtype)
        sizes = ChoiceNode(tuple(case.x.shape), tuple(case.weight.shape), case.geometry, dtype, True)
        for direction, runs in runs_of(case, sizes).items():
            choice = rule(sizes, direction, isa).implementation
            times = medians(runs, options.turns, evict)
            line += "   " + "".join(f"{ms:8.2f}{'*' if name == choice else ' '}" for name, ms in times.items())
            best = min(times.values())
            for i, ms in enumerate((times[choice], best, times["fused"])):
                totals[direction][i] += ms
            worst.append((times[choice] / best, f"{node.name} {direction}: {choice} takes {times[choice]:.2f} ms, the best {best:.2f}"))
        print(line, flush=True)
    for direction, (rule_ms, best_ms, fused_ms) in totals.items():
        print(f"{direction}: rule {rule_ms:.1f} ms, best {best_ms:.1f} ({rule_ms / best_ms:.3f}), fused alone {fused_ms:.1f}")
    print("furthest from the best:", *(text for _, text in sorted(worst, reverse=True)[:5]), sep="\n  ")


if __name__ == "__main__":
    main()
