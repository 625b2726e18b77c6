"""The numbers that stand for element types and activations in C++ (src/activation.h)."""

from __future__ import annotations

import torch

from bnrestructure.core.activation import PLAIN_ACTIVATIONS, negative_slope

__all__ = ["ACTIVATIONS", "ELEMENT_CODES", "activation_code"]

#: Activation names and their numbers; leaky_relu(SLOPE) comes after them.
ACTIVATIONS = {name: number for number, name in enumerate(PLAIN_ACTIVATIONS)}

#: Element types and their numbers.
ELEMENT_CODES = {torch.float32: 0, torch.bfloat16: 1}


def activation_code(act: str) -> tuple[int, float]:
    """(number, negative slope) of an activation's name. Raises ValueError for an unknown one."""
    code = ACTIVATIONS.get(act)
    if code is not None:
        return code, 0.0
    return len(ACTIVATIONS), negative_slope(act)
