"""conv-bn-add(-act): residuals with an identity shortcut or with a shortcut that has a batch norm of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure.graph.activations import activation_of
from bnrestructure.graph.ir import Conv, Normalise
from bnrestructure.graph.operations import add_of
from bnrestructure.graph.order import readers_of
from bnrestructure.patterns.pairs import plain_normalise

__all__ = ["ResidualMatch", "residual"]


@dataclass(frozen=True)
class ResidualMatch:
    """``act(normalise(y) + shortcut)``; ``other`` is the shortcut's normalise if it has one.

    The activation is a node of its own, or what all readers, ``activating`` convolutions, apply in their prologues.
    """

    add: fx.Node
    normalise: Normalise
    shortcut: fx.Node
    other: Normalise | None
    activation: fx.Node | None
    activating: list[Conv]
    act: str


def residual(node: fx.Node) -> ResidualMatch | None:
    """An add of a normalised tensor that nothing else reads, before any activation."""
    operands = add_of(node)
    if operands is None:
        return None
    branches = [(normalise, operand) for operand in operands if (normalise := _normalise_for_add(operand)) is not None]
    if not branches:
        return None
    normalise, z = max(branches, key=lambda branch: branch[0].node)  # an older operand is the shortcut
    other = next((n for n, _ in branches if n.node is not normalise.node), None)
    shortcut = next(operand for operand in operands if operand is not z)
    readers = readers_of(node)
    activation = activation_of(readers[0]) if len(readers) == 1 else None
    if activation is not None:
        return ResidualMatch(node, normalise, shortcut, other, activation.node, [], activation.name)
    act, activating = _common_activation(node, readers)
    return ResidualMatch(node, normalise, shortcut, other, None, activating, act)


def _common_activation(add: fx.Node, readers: list[fx.Node]) -> tuple[str, list[Conv]]:
    """The activation that every reader of the sum applies to it, nothing else before it, and the readers; none where they differ."""
    convs = [conv for reader in readers if (conv := _activating_conv(reader, add)) is not None]
    acts = {conv.act for conv in convs}
    if len(convs) < len(readers) or len(acts) != 1 or acts == {"identity"}:
        return "identity", []
    return acts.pop(), convs


def _activating_conv(reader: fx.Node, tensor: fx.Node) -> Conv | None:
    """A convolution that reads a tensor once, and applies at most an activation to it; not if it passes it on to readers unseen."""
    conv = Conv.of(reader)
    if conv is None or conv.x is not tensor or conv.mean is not None or conv.gate is not None or conv.chain:
        return None
    return conv if conv.times_read(tensor) == 1 else None


def _normalise_for_add(operand: fx.Node) -> Normalise | None:
    return plain_normalise(operand) if len(operand.users) == 1 else None
