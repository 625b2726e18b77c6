"""What a training step costs the host: calls of Python functions, with a driver that does nothing.

Everything up to the driver is real, Triton's own launcher among it; the tensors are on the meta device. What PyTorch does there in Python,
and on a GPU in C++, is left out of the count.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any
from unittest import mock

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.cuda_code.record import pretending, rewritten

__all__ = ["Host", "host_of"]

#: Parts of PyTorch that stand for a GPU's operations on the meta device.
_STAND_INS = (
    "/torch/_meta_registrations", "/torch/_refs", "/torch/_prims", "/torch/_decomp", "/torch/_ops", "/torch/library", "/unittest/mock",
)  # fmt: skip


@dataclass(frozen=True)
class Host:
    """Python's calls in one training step, by package."""

    calls: Counter[str]


class _Driver:
    """Triton's driver without a device."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def is_active(self) -> bool:
        return True


class _Compiled:
    """A compiled kernel that does nothing."""

    function = 0
    packed_metadata = ()

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


#: What a real driver has in C.
_FAKE = {value.__code__ for kind in (_Driver, _Compiled) for value in vars(kind).values() if isinstance(value, FunctionType)}


def _compile(kernel: Any, key: Any, signature: Any, device: Any, *_: Any) -> _Compiled:
    compiled = _Compiled()
    kernel.device_caches[device][0][key] = compiled
    return compiled


class _Calls:
    """Counts the Python functions that are called while it is on, but for what stand-ins call."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._inside = 0  # calls of stand-ins, and below them, that are under way

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            if self._inside or frame.f_code in _FAKE or any(part in file for part in _STAND_INS):
                self._inside += 1
            else:
                self.found[_package(file)] += 1
        elif event == "return" and self._inside:
            self._inside -= 1


def _package(file: str) -> str:
    for package in ("bnrestructure", "triton", "torch"):
        if f"/{package}/" in file:
            return package
    return "the graph" if file.startswith("<") else "other"


@contextmanager
def _fake_driver() -> Iterator[None]:
    with mock.patch.object(driver, "_active", _Driver()), mock.patch.object(JITFunction, "_do_compile", _compile):
        yield


def host_of(model: nn.Module, batch: int, size: int = 224) -> Host:
    """One training step of ``model`` (``prepared`` in record.py) in bf16 autocast, on images [batch, 3, size, size]."""
    x = torch.empty(batch, 3, size, size, device="meta").contiguous(memory_format=torch.channels_last)
    with pretending() as switch, _fake_driver():
        forward, parameters = rewritten(model, x, switch), list(model.parameters())

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            forward(x).float().sum().backward()

        for _ in range(2):
            step()
        calls = _Calls()
        sys.setprofile(calls)
        try:
            step()
        finally:
            sys.setprofile(None)
    return Host(calls.found)
