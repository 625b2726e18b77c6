"""What a training step launches on a GPU, and its least time on an H100 by instruction counts: ``python -m benchmarks.cuda_code``.

    python -m benchmarks.cuda_code densenet121 resnet50 --batch 256     launches, small operations, modelled time, the worst nodes
    python -m benchmarks.cuda_code --launches                           the counts alone: nothing is compiled
    python -m benchmarks.cuda_code --host                               what the step costs the host, by calls of Python functions

The step (bf16 autocast, channels_last) runs on meta tensors, so no GPU is needed; **nothing is timed**. Compiling what a model launches
takes minutes, and is kept in build/cuda-code.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton

from benchmarks.cuda_code.floors import GAP, Floor, floors, of_products, small_launches
from benchmarks.cuda_code.host import Host, host_of
from benchmarks.cuda_code.record import Step, prepared, record

MODELS = ("densenet121", "resnet50", "mobilenet_v2", "efficientnet_b0")
CACHE = Path(__file__).resolve().parents[2] / "build" / "cuda-code"
_WORST = 5


def main() -> int:
    """Print a block of lines for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help="torchvision names (default: four)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--launches", action="store_true", help="the counts alone")
    parser.add_argument("--host", action="store_true", help="the host's part alone")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, triton {triton.__version__}, bf16, batch {options.batch}, 224x224; counted, not timed")
    for name in options.models:
        if options.host:
            print(of_host(name, host_of(prepared(name), options.batch)), flush=True)
            continue
        step = record(prepared(name), options.batch)
        for line in (*counted(name, step), *(() if options.launches else modelled(step))):
            print(line, flush=True)
    return 0


def counted(name: str, step: Step) -> Iterator[str]:
    """How many kernels of ours and operations of PyTorch's a step gives a GPU, the most frequent of the latter by name."""
    others = sum(step.operations.values())
    yield f"{name}: {len(step.launches)} kernels ({step.forward} forward) and {others} of PyTorch's operations"
    yield "  " + ", ".join(f"{operation} {count}" for operation, count in step.operations.most_common(10))


def of_host(name: str, host: Host) -> str:
    """How many Python functions a step calls, and whose."""
    parts = ", ".join(f"{package} {count}" for package, count in host.calls.most_common())
    return f"{name}: {sum(host.calls.values())} calls of Python functions a step: {parts}"


def modelled(step: Step) -> Iterator[str]:
    """The least time of the step by floors.py, and the nodes that take the most of it."""
    found = list(floors(step, CACHE))
    products, gaps = of_products(step.products), small_launches(step) * GAP
    own = sum(floor.time for floor in found)
    total = own + products + gaps
    yield f"  at least {total * 1e3:.1f} ms: kernels {own * 1e3:.1f}, cuDNN's products {products * 1e3:.1f}, gaps {gaps * 1e3:.1f}"
    bounds = Counter[str]()
    for floor in found:
        bounds[floor.bound] += floor.time  # type: ignore[assignment]  # a Counter of seconds
    yield "  bound by " + ", ".join(f"{bound} {seconds * 1e3:.1f} ms" for bound, seconds in bounds.most_common())
    yield from map(_line, sorted(found, key=lambda floor: floor.memory - floor.time)[:_WORST])


def _line(floor: Floor) -> str:
    return f"  {floor.time * 1e6:6.0f} us, memory {floor.memory * 1e6:.0f}, {floor.bound}: {floor.kernel} {floor.direction} {floor.what}"


if __name__ == "__main__":
    sys.exit(main())
