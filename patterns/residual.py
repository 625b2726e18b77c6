"""conv-bn-add(-act): residuals with an identity shortcut or with a shortcut that has a batch norm of its own; sums without any; sums of
a branch that is activated, or gated, before it is added.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure.graph.activations import activation_of
from bnrestructure.graph.ir import Conv, Normalise, Statistics
from bnrestructure.graph.memory_rules import maker_for_one
from bnrestructure.graph.operations import add_of, product_of
from bnrestructure.graph.order import readers_of
from bnrestructure.graph.provenance import known_tensor
from bnrestructure.graph.targets import called_name, is_custom_call
from bnrestructure.patterns.pairs import normalise_making, plain_normalise

__all__ = ["ActivatedBranch", "ResidualMatch", "ScaledBranch", "activated_branch", "plain_sum", "residual", "scaled_branch"]


#: Functions and methods that make a tensor of no other's values.
_NEW = ("empty", "ones", "zeros", "full", "rand", "randn", "new_empty", "new_ones", "new_zeros", "new_full")


@dataclass(frozen=True)
class ResidualMatch:
    """``act(y + shortcut)``; ``normalise`` and ``other`` are the normalise that make y and the shortcut, if there are any. That of y may
    have a gate.

    The activation is a node of its own, or what all readers, ``activating`` convolutions, apply in their prologues.
    """

    add: fx.Node
    y: fx.Node
    normalise: Normalise | None
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
    activated = _activated(node)
    branches = [(normalise, operand) for operand in operands if (normalise := _normalise_for_add(operand)) is not None]
    gated = _gated_branches(node, activated[-1])
    if not branches and not gated:
        return None
    normalise, z = max(gated or branches, key=lambda branch: branch[0].node)  # an older operand is the shortcut
    other = next((n for n, _ in branches if n.node is not normalise.node), None)
    shortcut = next(operand for operand in operands if operand is not z)
    return ResidualMatch(node, normalise.x, normalise, shortcut, other, *activated)


def _gated_branches(add: fx.Node, act: str) -> list[tuple[Normalise, fx.Node]]:
    """The operands of an add that are normalised and gated, and nothing else, with the normalise that makes each: a squeeze-excite's.

    None where the sum is all that is wanted: the sweep that gates the branch adds the shortcut then, and hands on the sum's gradient.
    """
    if act == "identity" and not _has_statistics(add):
        return []
    operands = add_of(add) or ()
    made = [(Normalise.making(operand, "z"), operand) for operand in operands if len(operand.users) == 1]
    alone = [(n, z) for n, z in made if n is not None and n.gate is not None and n.is_alone and n.act == "identity"]
    return alone if all(_is_like(operand, add) for operand in operands) else []


def _has_statistics(tensor: fx.Node) -> bool:
    return any(Statistics.of(reader) is not None for reader in tensor.users)


def plain_sum(node: fx.Node) -> ResidualMatch | None:
    """An add without a batch norm before it, and with a ReLU or statistics behind: before a pre-activation, behind a squeeze-excite.

    Backward then needs nothing but the sum, which is in memory anyway. One operand is somebody's who makes it for the add alone: both
    have one gradient.
    """
    operands = add_of(node)
    if operands is None or any(_normalise_for_add(operand) is not None for operand in operands):
        return None
    y = max((operand for operand in operands if maker_for_one(operand) is not None), default=None)
    if y is None:
        return None
    activation, activating, act = _activated(node)
    followed = _has_statistics(node) and Normalise.making(y, "z") is None
    if act != "relu" and (act != "identity" or not followed):
        return None
    shortcut = next(operand for operand in operands if operand is not y)
    return ResidualMatch(node, y, None, shortcut, None, activation, activating, act) if _is_like(shortcut, node) else None


@dataclass(frozen=True)
class ActivatedBranch:
    """``act(normalise(x)) * gate + shortcut``, nothing else reading the branch."""

    add: fx.Node
    normalise: Normalise
    shortcut: fx.Node


@dataclass(frozen=True)
class ScaledBranch:
    """``act(normalise(x)) * factor``, nothing else reading the branch, where the factor is one number for each image."""

    product: fx.Node
    normalise: Normalise
    factor: fx.Node


def scaled_branch(node: fx.Node) -> ScaledBranch | None:
    """Stochastic depth's product with what it drew: a tensor of the batch's size that needs no gradient."""
    operands = product_of(node)
    for z, factor in () if operands is None else (operands, operands[::-1]):
        normalise = normalise_making(z)
        if normalise is not None and len(z.users) == 1 and _is_of_images(factor, node):
            return ScaledBranch(node, normalise, factor)
    return None


def _is_of_images(factor: fx.Node, product: fx.Node) -> bool:
    """Whether this is known to be one number for each image, or for all, of the product's dtype."""
    known, made = known_tensor(factor), known_tensor(product)
    if known is None or made is None or not _is_drawn(factor):
        return False
    shape, whole = tuple(known.shape), tuple(made.shape)
    fits = shape in ((), (*whole[:1], *[1] * (len(whole) - 1)), (1,) * len(whole))
    return fits and len(whole) > 1 and known.dtype == made.dtype


def _is_drawn(tensor: fx.Node) -> bool:
    """Whether a tensor is computed of a new one alone, which needs no gradient."""
    while called_name(tensor) not in _NEW:
        sources = tensor.all_input_nodes
        if called_name(tensor) is None or is_custom_call(tensor) or len(sources) != 1:
            return False
        (tensor,) = sources
    return not tensor.kwargs.get("requires_grad")


def activated_branch(node: fx.Node) -> ActivatedBranch | None:
    """An add of a normalised tensor behind its activation or gate: Darknet's and YOLO's bottlenecks. Of two the later one is the branch."""
    operands = add_of(node)
    made = [(Normalise.making(operand, "z"), operand) for operand in operands or ()]
    branches = [(n, z) for n, z in made if n is not None and n.r is None and len(z.users) == 1]
    if operands is None or not branches:
        return None
    normalise, z = max(branches, key=lambda branch: branch[0].node)
    shortcut = next(operand for operand in operands if operand is not z)
    return ActivatedBranch(node, normalise, shortcut) if _is_like(shortcut, node) else None


def _is_like(shortcut: fx.Node, add: fx.Node) -> bool:
    """Whether an operand has the sum's shape and dtype, as far as capture knows: what broadcasts is added in a step of its own."""
    operand, made = known_tensor(shortcut), known_tensor(add)
    return operand is None or made is None or (tuple(operand.shape), operand.dtype) == (tuple(made.shape), made.dtype)


def _activated(add: fx.Node) -> tuple[fx.Node | None, list[Conv], str]:
    """The activation of a sum: (its node, the convolutions that apply it in their prologues, its name)."""
    readers = readers_of(add)
    activation = activation_of(readers[0]) if len(readers) == 1 else None
    if activation is not None:
        return activation.node, [], activation.name
    act, activating = _common_activation(add, readers)
    return None, activating, act


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
