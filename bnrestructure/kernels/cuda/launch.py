"""The one place where kernels are launched, so that a launch can also be recorded instead of run.

Recording is how kernels are compiled ahead of time for devices that are not there (compile_ahead.py): the wrappers
run on meta tensors, and every launch they would make is noted with the arguments, constants and options that a device
would have got. The tests' emulator (tests/emulator) runs it on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["FP_FUSION", "Launch", "launch", "received_by", "recording"]

#: Whether Triton may contract a product and a sum. Its default is to change in 3.10; what must not differ from kernel to kernel is an
#: explicit multiply-add anyway (activation.py).
FP_FUSION = True


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the jitted function, its run-time arguments in order, its constants, its options and its grid."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    grid: tuple[int, ...]

    def on(self, part: int) -> Launch:
        """The launch as that part would get it: kernels that differ from part to part take its compute capability as PART."""
        return replace(self, constants={**self.constants, "PART": part}) if "PART" in self.kernel.arg_names else self


_receiver: Callable[[Launch], object] | None = None


@contextmanager
def received_by(receiver: Callable[[Launch], object]) -> Iterator[None]:
    """Hand launches to ``receiver`` instead of running them. Not for use from several threads."""
    global _receiver
    before, _receiver = _receiver, receiver
    try:
        yield
    finally:
        _receiver = before


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches in the list that is yielded, and run none."""
    recorded: list[Launch] = []
    with received_by(recorded.append):
        yield recorded


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of its first argument, on that device's current stream.

    A None argument is a compile-time constant to Triton: kernels ask ``if pointer is not None``.
    """
    if _receiver is not None:
        _receiver(Launch(kernel, arguments, constants, warps, stages, grid))
        return
    first: Tensor = arguments[0]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": FP_FUSION}
    index = first.device.index or 0
    if "PART" in kernel.arg_names:
        constants["PART"] = _part(index) if first.is_cuda else 0
    if first.is_cuda and index != torch._C._cuda_getDevice():  # a context manager for each launch would cost as much as the launch
        with torch.cuda.device(index):
            kernel[grid](*arguments, **options, **constants)
    else:  # without a device: Triton's interpreter
        kernel[grid](*arguments, **options, **constants)


@cache
def _part(device: int) -> int:
    """The compute capability of a device as a number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
