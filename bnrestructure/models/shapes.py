"""Whether a model takes inputs of this shape at all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bnrestructure.capture.swap import swap_out
from bnrestructure.core.errors import UsageError, first_line

__all__ = ["check_shapes"]


def check_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise UsageError with the model's own words when its training forward does not take inputs of these shapes.

    One sample runs for real: on the meta device a wrong shape and a data-dependent step would look the same.
    """
    tried = copy.deepcopy(model).train()
    swap_out(tried)  # the user's own forward is asked, not ours
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tried(*inputs)
    except Exception as error:  # a forward() may raise anything on a wrong shape
        shapes = [tuple(t.shape) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
        shown = ", ".join("x".join(map(str, shape)) for shape in shapes[:2])
        raise UsageError(f"the model does not take this input ({shown}): {first_line(error)}") from error
