"""What a wheel must do where it was installed, without a compiler: its kernels load, and a model trains on them as the original does.

    python check_wheel.py            the libraries of every instruction set, and one verification
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch
from torch import nn

import bnrestructure
from bnrestructure.kernels import cpu, registry
from bnrestructure.kernels.cpu import build, library


def main() -> int:
    """Exit status 1, and one line that says why, when something is missing or wrong."""
    missing = [isa for isa in build.targets() if not (Path(cpu.__file__).parent / build.library_name(isa)).exists()]
    if missing:
        print(f"no library for {', '.join(missing)} in {Path(cpu.__file__).parent}", file=sys.stderr)
        return 1
    if (reason := registry.unavailable_reason("cpu")) is not None:
        print(f"the kernels do not load: {reason}", file=sys.stderr)
        return 1
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Flatten()
    ).to(memory_format=torch.channels_last)
    report = bnrestructure.verify(model, torch.randn(4, 3, 12, 12), backend="cpu")
    print(f"bnrestructure {bnrestructure.__version__} on {platform.machine()}, {library.isa_name()} kernels: {report}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
