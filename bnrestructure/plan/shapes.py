"""What shapes a model's layers get from its inputs, and whether it takes them at all: its own forward is asked, not ours."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bnrestructure.capture.swap import swap_out
from bnrestructure.core.errors import UsageError, first_line

__all__ = ["Shapes", "check_shapes", "layer_shapes"]

#: Path of a layer -> shape and dtype of its input.
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def check_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise UsageError with the model's own words when its training forward does not take inputs of these shapes.

    It runs for real: on the meta device a wrong shape and a data-dependent step would look the same.
    """
    tried = copy.deepcopy(model).train()
    swap_out(tried)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tried(*pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs))
    except Exception as error:  # a forward() may raise anything on a wrong shape
        shown = ", ".join(_shown(leaf) for leaf in pytree.tree_leaves(inputs)[:2])
        raise UsageError(f"the model does not take this input ({shown}): {first_line(error)}") from error


def _shown(leaf: object) -> str:
    return "x".join(map(str, leaf.shape)) if isinstance(leaf, torch.Tensor) else repr(leaf)


def layer_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Shapes, str | None]:
    """Input shape and dtype of every batch norm and convolution layer in one training forward, from the meta device.

    The second result says why some are missing, or is None: data-dependent models cannot run there to the end.
    """
    found: Shapes = {}

    def record(name: str, x: torch.Tensor) -> None:
        found.setdefault(name, (x.shape, x.dtype))

    layers = (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd)
    names = {name for name, module in model.named_modules() if isinstance(module, layers[0])}
    try:
        double = copy.deepcopy(model).to("meta").train()
        swap_out(double)
        for name, module in double.named_modules():
            if isinstance(module, layers[0]) and module.momentum is None:
                module.momentum = 0.1  # a cumulative average reads a counter's value, which a meta tensor has not
            if isinstance(module, layers):
                module.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]) if args else None)
        double(*pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:  # it reads values, or cannot be there
        # Meta tensors have no values. Shapes found so far still serve the plan, which then says how far they go.
        return found, f"shapes are known for {len(names & found.keys())} batch norms only: {first_line(error)}"
    return found, None
