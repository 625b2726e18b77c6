"""conv-bn-add(-act): residual joins with an identity shortcut or with a shortcut that has a batch norm of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import is_fused, produced_by, tensor_readers
from bnrestructure.graph.layers import modules_of
from bnrestructure.graph.operations import activation_of, add_of

__all__ = ["ResidualMatch", "find_residuals"]


@dataclass(frozen=True)
class ResidualMatch:
    """``act(normalise(y) + shortcut)``; the shortcut is the add's other operand, ``other_normalise`` its normalise if it has one.

    The activation is a node of its own, or what all readers, ``activating`` convolutions, apply in their prologues.
    """

    add: fx.Node
    normalise: fx.Node
    other_normalise: fx.Node | None
    activation: fx.Node | None
    activating: list[fx.Node]
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
        moved = None if act is not None else _common_activation(node, readers)
        found.append(
            ResidualMatch(
                add=node,
                normalise=normalise,
                other_normalise=other,
                activation=None if act is None else readers[0],
                activating=[] if moved is None else readers,
                act=act[0] if act is not None else moved or "identity",
            )
        )
    return found


def _common_activation(add: fx.Node, readers: list[fx.Node]) -> str | None:
    """The activation that every reader of the sum applies to it, nothing else before it; None where they differ or it is none."""
    found = {_bare_activation(reader, add) for reader in readers}
    act = found.pop() if len(found) == 1 else None
    return None if act == "identity" else act


def _bare_activation(reader: fx.Node, tensor: fx.Node) -> str | None:
    """Its activation, if the reader applies nothing else and reads the tensor once; not if it passes it on to readers unseen."""
    of = reader.kwargs
    if not is_fused(reader, ops.conv) or of["x"] is not tensor or of["mean"] is not None or of["gate"] is not None or of["thread"]:
        return None
    return str(of["act"]) if sum(value is tensor for value in of.values()) == 1 else None


def _plain_normalise(operand: fx.Node) -> fx.Node | None:
    """The normalise node behind this operand, if it has no activation and the add is its only reader."""
    normalise = produced_by(operand, ops.normalise, "z")
    if normalise is None or normalise.kwargs["act"] != "identity" or len(operand.users) != 1:
        return None
    return normalise
