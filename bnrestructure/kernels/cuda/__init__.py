"""Triton kernels for NVIDIA GPUs (compute capability 8.0 and newer).

Importing this package needs neither a GPU nor Triton: the modules behind the kernels are imported when a call is first answered. Under
TRITON_INTERPRET=1 the same kernels run, slowly, on CPU tensors: so they are tested without a GPU.
"""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import Any, TypeVar

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward
from bnrestructure.kernels.choice import Choice, Convolutions
from bnrestructure.kernels.cuda import limits
from bnrestructure.kernels.cuda.device import gpu_here, identify_machine
from bnrestructure.kernels.cuda.rule import BACKWARD, CudaRule
from bnrestructure.kernels.operands import checked_kind
from bnrestructure.kernels.reference import Reference

__all__ = ["KERNELS", "CudaKernels"]

R = TypeVar("R")

#: Kinds of calls that are remembered: a model's, at several sizes.
_MOST_KINDS = 10_000


class CudaKernels:
    """See :class:`bnrestructure.kernels.device.DeviceKernels`."""

    def __init__(self) -> None:
        self._rule = CudaRule()
        self._supported: set[tuple[Any, ...]] = set()  # kinds of calls

    @cached_property
    def convolutions(self) -> Convolutions:
        """The convolution nodes."""
        fused, hybrid = import_module(f"{__name__}.convolution"), import_module(f"{__name__}.hybrid").Hybrid(self)
        implementations = {"fused": fused.Dense(), "depthwise": fused.Depthwise(), "hybrid": hybrid, "reference": Reference()}
        return Convolutions(self, self._rule, implementations, BACKWARD)

    @cached_property
    def _sweeps(self) -> dict[type[Call[Any]], Any]:
        found: dict[type[Call[Any]], Any] = import_module(f"{__name__}.sweep_calls").RUN
        return found

    def run(self, call: Call[R]) -> R:
        """The call's result. Raises UnsupportedCallError where these kernels cannot answer, before anything is written."""
        kind = checked_kind(call)
        if kind not in self._supported:
            if (reason := limits.supports(call)) is not None:
                raise UnsupportedCallError(reason)
            if len(self._supported) >= _MOST_KINDS:
                self._supported.clear()
            self._supported.add(kind)
        found: Any
        if isinstance(call, ConvForward):
            found = self.convolutions.forward(call)
        elif isinstance(call, ConvBackward):
            found = self.convolutions.backward(call)
        else:
            found = self._sweeps[type(call)](call)
        result: R = found
        return result

    def supports(self, call: Call[Any]) -> str | None:
        """Why these kernels cannot answer the call, in one line, or None. Neither memory nor the device is touched."""
        return limits.supports(call)

    def unavailable_reason(self) -> str | None:
        """Why none of them can run in this installation, in one line, or None."""
        return limits.unavailable_reason()

    def convolution_choices(self, call: ConvForward) -> tuple[Choice, Choice]:
        """(forward, backward): what a convolution node like this one will run, and why; by rule where there is no GPU."""
        return Convolutions(self, self._rule, {}, BACKWARD).choices(call)

    def description(self) -> str:
        """The GPU, and where its measured choices are kept."""
        gpu = gpu_here() or "no GPU"
        identify_machine(gpu)
        return f"{gpu}; {tuning.where_kept()}"


KERNELS = CudaKernels()
