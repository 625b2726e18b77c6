"""Times single convolution nodes on CPU: the fused and the hybrid kernels, the bare ATen convolution, and the unfused
batch norm, activation, convolution sequence of an eager training step.

    python benchmarks/cpu_convolution.py                      every node below, float32
    python benchmarks/cpu_convolution.py densenet --bf16      those whose name matches

A node's versions are timed in turns and the medians are printed, in milliseconds. A node whose numbers are wrong is not
timed: the program stops.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable

import torch
from convolution_case import Case, Node
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.activation import activate
from bnrestructure.kernels.cpu import KERNELS

NODES = (
    *(Node(f"densenet 1x1 {c}->128 {s}", c, 128, s, pitch=p)
      for c, s, p in (
          (64, 56, 256), (192, 56, 256), (256, 28, 512), (768, 14, 1024), (1792, 14, 1792), (960, 7, 1024)
      )),
    *(Node(f"densenet 3x3 128->32 {s}", 128, 32, s, 3) for s in (56, 28, 14, 7)),
    Node("densenet transition 512->256 28", 512, 256, 28),
    Node("mobilenet 1x1 32->16 112", 32, 16, 112, act="relu6"),
    Node("mobilenet 1x1 16->96 112", 16, 96, 112, act="identity"),
    Node("mobilenet 1x1 144->24 56", 144, 24, 56, act="relu6"),
    Node("mobilenet 1x1 64->384 14", 64, 384, 14, act="identity"),
    Node("mobilenet 1x1 576->96 14", 576, 96, 14, act="relu6"),
    Node("mobilenet 1x1 320->1280 7", 320, 1280, 7, act="identity"),
    Node("efficientnet 1x1 240->40 28", 240, 40, 28, act="silu"),
    Node("resnet 1x1 64->256 56", 64, 256, 56),
    Node("resnet 1x1 256->64 56", 256, 64, 56, act="identity", affine=False),
    Node("resnet 1x1 1024->256 14", 1024, 256, 14, act="identity", affine=False),
    Node("resnet 1x1 512->2048 7", 512, 2048, 7),
    Node("resnet 1x1/2 256->512 56", 256, 512, 56, stride=2, act="identity", affine=False),
    *(Node(f"resnet 3x3 {c} {s}", c, c, s, 3) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
    Node("resnet 3x3/2 128 56", 128, 128, 56, 3, 2),
    Node("resnet 3x3/2 512 14", 512, 512, 14, 3, 2),
    Node("resnext 3x3 128 g32 56", 128, 128, 56, 3, groups=32),
    Node("resnext 3x3 512 g32 14", 512, 512, 14, 3, groups=32),
    Node("regnet 3x3 216 g9 28", 216, 216, 28, 3, groups=9),
    Node("stem 7x7/2 3->64 224", 3, 64, 224, 7, 2, act="identity", affine=False),
    Node("vgg 3x3 256 56", 256, 256, 56, 3),
    Node("vgg 3x3 512 14", 512, 512, 14, 3),
)  # fmt: skip


def paired_medians(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, run in turns for about ``seconds`` altogether (at least five turns)."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(node: Node, batch: int, dtype: torch.dtype, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds by direction and version. Raises AssertionError where a kernel's result is wrong."""
    case = Case(node, batch, dtype)
    by = {name: KERNELS.convolutions.by(name).run for name in ("fused", "hybrid")} | {"chosen": KERNELS.run}
    forward = {name: case.forward(run) for name, run in by.items()}
    backward = {name: case.backward(run) for name, run in by.items()}
    case.check([*forward.values()], [case.backward(run, accumulate=False) for run in by.values()])

    x, weight, p, needs = case.x, case.weight, case.p, case.needs
    z, w = x.contiguous(memory_format=torch.channels_last), weight.to(dtype)
    rest = case.geometry.aten_arguments
    leaf, gamma = z.detach().clone().requires_grad_(needs[0]), torch.ones(node.channels, requires_grad=True)
    leaf_weight = weight.detach().clone().requires_grad_()

    def eager() -> Tensor:
        normal = F.batch_norm(leaf, None, None, gamma, None, training=True) if node.affine else leaf
        return torch.convolution(activate(normal, node.act), leaf_weight.to(dtype), None, *rest)

    graph = eager()
    wanted = [leaf_weight, *([gamma] if node.affine else []), *([leaf] if needs[0] else [])]
    bare = {
        "forward": lambda: torch.convolution(z, w, None, *rest),
        "backward": lambda: torch.ops.aten.convolution_backward(p, z, w, None, *rest, [needs[0], True, False]),
    }
    eagerly = {"forward": eager, "backward": lambda: torch.autograd.grad(graph, wanted, p, retain_graph=True)}
    ours = {"forward": forward, "backward": backward}
    return {d: paired_medians({"bare": bare[d], "eager": eagerly[d], **ours[d]}, seconds) for d in ours}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="regular expression that a node's name must match")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 activations")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each node and direction")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    print(f"{'':34}{'forward, ms':^48}  {'backward, ms':^48}")
    columns = f"{'bare':>8}{'eager':>8}{'fused':>8}{'hybrid':>8}{'/bare':>8}{'/eager':>8}"
    print(f"{'node':34}{columns}  {columns}  chosen")
    for node in NODES:
        if not re.search(options.pattern, node.name):
            continue
        line = f"{node.name:34}"
        chosen = ""
        for times in measure(node, options.batch, dtype, options.seconds).values():
            bare, eager, fused, hybrid, own = (times[k] for k in ("bare", "eager", "fused", "hybrid", "chosen"))
            line += f"{bare:8.2f}{eager:8.2f}{fused:8.2f}{hybrid:8.2f}{own / bare:8.2f}{own / eager:8.2f}  "
            chosen += "f" if abs(own - fused) < abs(own - hybrid) else "h"
        print(line + chosen, flush=True)


if __name__ == "__main__":
    main()
