"""C++ kernels for channels_last activations of 4 dimensions in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward, FinalizeBackward, FinalizeForward
from bnrestructure.kernels.choice import Choice, Convolutions, Implementation
from bnrestructure.kernels.cpu import finalize, library, sweeps
from bnrestructure.kernels.cpu.convolution import Fused
from bnrestructure.kernels.cpu.rule import HALVES, CpuRule, instruction_set
from bnrestructure.kernels.hybrid import Hybrid

__all__ = ["KERNELS", "CpuKernels"]

R = TypeVar("R")


class CpuKernels:
    """See :class:`bnrestructure.kernels.device.DeviceKernels`."""

    def __init__(self) -> None:
        implementations: dict[str, Implementation] = {
            "fused": Fused("conv"),
            "hybrid": Hybrid(self),
            "winograd": Fused("winograd"),
            "depthwise": Fused("depthwise", depthwise=True),
        }
        self.convolutions = Convolutions(self, CpuRule(), implementations, HALVES)
        self._run: dict[type[Call[Any]], Callable[[Any], Any]] = {
            ConvForward: self.convolutions.forward,
            ConvBackward: self.convolutions.backward,
            **sweeps.RUN,
            **finalize.RUN,
        }

    def run(self, call: Call[R]) -> R:
        """The call's result. Raises UnsupportedCallError where these kernels cannot answer, before anything is written."""
        found: R = self._run[type(call)](call)
        return found

    def supports(self, call: Call[Any]) -> str | None:
        """Why these kernels cannot answer the call, in one line, or None. Its tensors may be on the meta device."""
        if (reason := library.unavailable_reason()) is not None:
            return reason
        if isinstance(call, ConvForward | ConvBackward):
            return self.convolutions.rule.unsupported(call)
        return finalize.unsupported(call) if isinstance(call, FinalizeForward | FinalizeBackward) else sweeps.unsupported(call)

    def unavailable_reason(self) -> str | None:
        """Why none of them can run in this installation, in one line, or None."""
        return library.unavailable_reason()

    def convolution_choices(self, call: ConvForward) -> tuple[Choice, Choice]:
        """(forward, backward): what a convolution node like this one will run, and why."""
        return self.convolutions.choices(call)

    def description(self) -> str:
        """The instruction set in use, libraries that cannot be, and where tuned choices are kept."""
        self.convolutions.rule.identify(torch.device("cpu"))
        return "; ".join([instruction_set(), *library.damaged().values(), tuning.where_kept()])


KERNELS = CpuKernels()
