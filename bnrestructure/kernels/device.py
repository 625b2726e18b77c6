"""What an implementation of a device's kernels has beside the answers to calls: what a plan and ``doctor`` ask for."""

from __future__ import annotations

from typing import Protocol

from bnrestructure.kernels.calls import ConvForward, Kernels
from bnrestructure.kernels.choice import Choice, Convolutions

__all__ = ["DeviceKernels"]


class DeviceKernels(Kernels, Protocol):
    """Kernels for the tensors of one type of device."""

    @property
    def convolutions(self) -> Convolutions:
        """The convolution nodes, with a choice of implementations."""

    def __hash__(self) -> int:
        """Answers are remembered by it."""

    def unavailable_reason(self) -> str | None:
        """Why none of them can run in this installation, in one line, or None."""

    def description(self) -> str:
        """What they run on, and where measured choices are kept."""

    def convolution_choices(self, call: ConvForward) -> tuple[Choice, Choice]:
        """(forward, backward): what a convolution node like this one will run, and why; tensors may be on the meta device.

        ``reference`` where no kernel here can. Backward is meant with both the input's and the weight's gradient wanted.
        """
