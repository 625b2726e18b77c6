"""A choice among a convolution node's implementations, in the words that every device's convolution_choice.py uses."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BACKWARD", "Choice"]

#: The candidates for a dense backward pass: the implementation of the input gradient and of the weight gradient. Where only one
#: of them is needed, or both are the same, the name has one word.
BACKWARD = {
    "fused": ("fused", "fused"),
    "hybrid": ("hybrid", "hybrid"),
    "fused dgrad, hybrid wgrad": ("fused", "hybrid"),
    "hybrid dgrad, fused wgrad": ("hybrid", "fused"),
}


class Choice(NamedTuple):
    """``implementation`` is "fused", "hybrid" or what else a device has; for a backward pass it may be one of ``BACKWARD``."""

    implementation: str
    reason: str
