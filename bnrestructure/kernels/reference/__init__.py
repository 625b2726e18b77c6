"""Plain-PyTorch kernels: complete for every node, dtype and device; slow, obviously right, and the oracle of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from bnrestructure.core.edges import ConvGradients
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward, ConvResult
from bnrestructure.kernels.operands import checked_kind
from bnrestructure.kernels.reference import convolution, statistics, sweeps

__all__ = ["REFERENCE", "RUN", "Reference", "ReferenceKernels"]

R = TypeVar("R")

#: What answers each call.
RUN: dict[type[Call[Any]], Callable[[Any], Any]] = {**convolution.RUN, **statistics.RUN, **sweeps.RUN}


class ReferenceKernels:
    """See :class:`bnrestructure.kernels.calls.Kernels`."""

    def supports(self, call: Call[Any]) -> str | None:
        """None: it answers everything, if PyTorch does."""
        return None

    def run(self, call: Call[R]) -> R:
        """The call's result, or PyTorch's error. Raises RuntimeError for tensors on several devices, or without memory behind them."""
        checked_kind(call)
        found: R = RUN[type(call)](call)
        return found


REFERENCE = ReferenceKernels()


class Reference:
    """The reference as an implementation of the convolution node (kernels/choice.py)."""

    finishes_join = True

    def forms_sum(self, node: Any) -> bool:
        """No: memory for the sum may be a view here, and the reference lays it out anew."""
        return False

    def forward(self, call: ConvForward, site: Any = None) -> ConvResult:
        """The result."""
        return convolution.conv_forward(call)

    def backward(self, call: ConvBackward, site: Any = None) -> ConvGradients:
        """The gradients."""
        return convolution.conv_backward(call)
