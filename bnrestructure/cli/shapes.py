"""Whether a model takes inputs of this shape at all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bnrestructure.capture.swap import swap_out
from bnrestructure.errors import UsageError

__all__ = ["check_shapes"]


def check_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise UsageError with the model's own words when its training forward does not take inputs of these shapes.

    One sample runs for real: on the meta device a wrong shape and a data-dependent step would look the same.
    """
    tried = swap_out_copy(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tried(*inputs)
    except Exception as error:  # a forward() may raise anything on a wrong shape
        lines = str(error).strip().splitlines()
        shapes = [tuple(t.shape) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
        shown = ", ".join("x".join(map(str, shape)) for shape in shapes[:2])
        raise UsageError(
            f"the model does not take this input ({shown}): {lines[0] if lines else type(error).__name__}"
        ) from error


def swap_out_copy(model: nn.Module) -> nn.Module:
    """A deep copy in training mode that runs its own forward."""
    tried = copy.deepcopy(model).train()
    swap_out(tried)
    return tried
