"""Shapes of every tensor in a captured graph, from the meta device: for pages that show what each step costs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bnrestructure.capture.swap import swap_out

__all__ = ["Shapes", "node_shapes", "region_inputs"]

#: (shape, dtype) by the node's name in the captured graph.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def region_inputs(model: nn.Module, inputs: tuple[Any, ...], regions: list[str]) -> dict[str, tuple[Any, ...]]:
    """The arguments, on the meta device, that each region's forward gets in one training forward of the model.

    Regions that are not reached, because the model reads values that meta tensors have not, are missing.
    """
    double = copy.deepcopy(model).to("meta").train()
    swap_out(double)
    found: dict[str, tuple[Any, ...]] = {}
    for path in regions:
        double.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: found.setdefault(path, args) and None)
    try:
        double(*pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs))
    except Exception:  # a user's forward may raise anything on tensors without values; what was seen until then serves
        return found
    return found


def node_shapes(captured: fx.GraphModule, inputs: tuple[Any, ...]) -> Shapes:
    """Shape and dtype of what each node of a captured graph returns, as far as the graph runs on the meta device.

    A node that returns several tensors is left out.
    """
    recorder = _Recorder(copy.deepcopy(captured).to("meta"))
    try:
        recorder.run(*inputs)
    except Exception:  # as above: the graph's calls are the user's
        return recorder.shapes
    return recorder.shapes


class _Recorder(fx.Interpreter):
    """Runs a graph and notes what each node gave."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.shapes: Shapes = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = (tuple(value.shape), value.dtype)
        return value
