"""Tensors that are split: ``chunk`` and ``split``, their parts, and which of a batch norm's vectors a part of one is of."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bnrestructure.graph.ir import Finalize
from bnrestructure.graph.layers import arguments_of, input_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.graph.targets import called_name, is_custom_call

__all__ = ["Split", "batch_norm_scaling_by", "part_of", "split_of"]

_OPERATIONS = {"chunk": torch.chunk, "split": torch.split}
#: What the number of parts, the size of each, or all their sizes are called.
_HOW = ("how", "chunks", "split_size_or_sections", "split_size")


@dataclass(frozen=True)
class Split:
    """``torch.chunk(input, how, dim)`` or ``torch.split(input, how, dim)``: the node's result is a sequence of parts."""

    node: fx.Node
    input: fx.Node
    operation: str
    how: Any
    dim: int

    def sizes(self, whole: int) -> list[int] | None:
        """The sizes of the parts of a dimension of size ``whole``, where the graph alone tells."""
        how = self.how
        if isinstance(how, list | tuple):
            return list(how) if all(isinstance(size, int) for size in how) else None
        if not isinstance(how, int) or how < 1:
            return None
        size = min(-(-whole // how), whole) if self.operation == "chunk" else min(how, whole)
        return [min(size, whole - start) for start in range(0, whole, size)]

    def again(self, tensor: fx.Node, dim: int) -> fx.Node:
        """Another tensor split in the same way along ``dim``, in a new node before this one."""
        with self.node.graph.inserting_before(self.node):
            return self.node.graph.call_function(_OPERATIONS[self.operation], (tensor, self.how, dim))


def split_of(node: fx.Node) -> Split | None:
    """The split that this node is, else None."""
    name, source = called_name(node), input_of(node)
    if name not in _OPERATIONS or source is None or is_custom_call(node) or provenance(node).changed_by is not None:
        return None
    given = arguments_of(node, ("input", "how", "dim"), {"dim": 0})
    how = next((given[word] for word in _HOW if word in given), None)
    return Split(node, source, name, how, given["dim"]) if isinstance(given["dim"], int) else None


def part_of(node: fx.Node) -> tuple[Split, int] | None:
    """(the split of which this node is a part, which part); None of other nodes."""
    if node.target is not operator.getitem:
        return None
    parts, index = node.args
    split = split_of(parts) if isinstance(parts, fx.Node) else None
    return (split, index) if split is not None and isinstance(index, int) else None


def batch_norm_scaling_by(scale: fx.Node | None) -> Finalize | None:
    """The batch norm whose scale, or a part of it, this vector is."""
    part = None if scale is None else part_of(scale)
    return Finalize.making(scale, "scale") if part is None else batch_norm_scaling_by(part[0].input)
