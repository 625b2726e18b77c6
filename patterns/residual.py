"""conv-bn-add(-act): residual joins with an identity shortcut or with a shortcut that has a batch norm of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import produced_by, tensor_readers
from bnrestructure.graph.layers import modules_of
from bnrestructure.graph.operations import activation_of, add_of

__all__ = ["ResidualMatch", "find_residuals"]


@dataclass(frozen=True)
class ResidualMatch:
    """``act(normalise(y) + shortcut)``; the shortcut is the add's other operand, ``other_normalise`` its normalise if it has one."""

    add: fx.Node
    normalise: fx.Node
    other_normalise: fx.Node | None
    activation: fx.Node | None
    act: str


def find_residuals(gm: fx.GraphModule) -> list[ResidualMatch]:
    """Adds of a normalised tensor that nothing else reads, before any activation."""
    modules = modules_of(gm)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    found = []
    for node in gm.graph.nodes:
        operands = add_of(node)
        if operands is None:
            continue
        plain = [_plain_normalise(operand) for operand in operands]
        if plain[0] is None and plain[1] is None:
            continue
        present = [normalise for normalise in plain if normalise is not None]
        normalise = max(present, key=position.__getitem__)  # the branch; an older operand is the shortcut
        other = next((n for n in present if n is not normalise), None)
        readers = tensor_readers(node)
        act = activation_of(readers[0], modules) if len(readers) == 1 else None
        found.append(
            ResidualMatch(
                add=node,
                normalise=normalise,
                other_normalise=other,
                activation=None if act is None else readers[0],
                act="identity" if act is None else act[0],
            )
        )
    return found


def _plain_normalise(operand: fx.Node) -> fx.Node | None:
    """The normalise node behind this operand, if it has no activation and the add is its only reader."""
    normalise = produced_by(operand, ops.normalise, "z")
    if normalise is None or normalise.kwargs["act"] != "identity" or len(operand.users) != 1:
        return None
    return normalise
