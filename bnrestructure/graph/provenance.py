"""What a node of a graph remembers of the model that it came from: one object, under one key of ``node.meta``.

Beside it stand keys of torch.fx's own: ``nn_module_stack``, which a replacement takes over, and what is known of the tensor that the node
makes, ``tensor_meta`` from capture or ``example_value`` from Dynamo.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

__all__ = [
    "Format",
    "Provenance",
    "carry",
    "guarded_tensor",
    "known_tensor",
    "locate",
    "module_path",
    "provenance",
    "remember",
    "take_halves",
]

_KEY, _STACK = "provenance", "nn_module_stack"

#: The order of a tensor's dimensions in memory, outermost first.
Format = tuple[int, ...]


@dataclass(frozen=True)
class Provenance:
    """Where a node came from, and which halves of which batch norms it does. A site is one call of a batch norm layer, by name.

    module              path of the module that the node was a call of, or that its forward() made it in
    site                the site whose batch norm this node is: whole, or its finalize
    statistics_of       the sites whose statistics this node takes
    normalises          the sites whose normalisation this node applies
    shared_statistics   the statistics are of one segment of a concat, and the sites in question put several together
    changed_by          the in-place operation that changes memory which this node's tensor may share: patterns keep away
    storages            names of the memory that the node's tensors are in: nodes with one in common may see each other's writes
    formats             of the tensors that the node reads, argument by argument, as eager has them; None of what is no strided tensor
    vector              the node makes per-channel vectors [C], no activation
    unlike              the segments of this concat are of several dtypes or numbers of dimensions, or one of them is empty
    overwrites          which of the node's inputs it changes in place, where neither its name nor its arguments say so
    hands_through       in eager the node's result is the very tensor that it reads: ``y.contiguous()`` where y is
    """

    module: str | None = None
    site: str | None = None
    statistics_of: tuple[str, ...] = ()
    normalises: tuple[str, ...] = ()
    shared_statistics: bool = False
    changed_by: str | None = None
    storages: frozenset[int] | None = None
    formats: tuple[Format | None, ...] = ()
    vector: bool = False
    unlike: bool = False
    overwrites: int | None = None
    hands_through: bool = False


_NOTHING = Provenance()


def provenance(node: fx.Node) -> Provenance:
    """What this node remembers."""
    found: Provenance = node.meta.get(_KEY, _NOTHING)
    return found


def remember(node: fx.Node, **changes: Any) -> None:
    """Change some of what a node remembers, by the names of :class:`Provenance`'s members."""
    node.meta[_KEY] = replace(provenance(node), **changes)


def known_tensor(node: fx.Node) -> Any:
    """What capture or Dynamo know of the tensor that this node makes: something with its shape, stride and dtype, or None."""
    return node.meta.get("tensor_meta", node.meta.get("example_value"))


def guarded_tensor(node: fx.Node) -> Any:
    """An example of the tensor that this node makes, or None; its sizes hold in every call, because Dynamo guards them."""
    return node.meta.get("example_value")


def locate(new: fx.Node, near: fx.Node) -> None:
    """A node that was made beside another: the user's modules around it are the same."""
    if _STACK in near.meta:
        new.meta.setdefault(_STACK, near.meta[_STACK])


def take_halves(new: fx.Node, *olds: fx.Node) -> None:
    """``new`` now does, beside its own, what these nodes did for batch norms."""
    known = [provenance(node) for node in (new, *olds)]
    if known[1:] != [_NOTHING] * len(olds):
        remember(
            new,
            statistics_of=tuple(site for each in known for site in each.statistics_of),
            normalises=tuple(site for each in known for site in each.normalises),
            shared_statistics=any(each.shared_statistics for each in known),
        )


def carry(new: fx.Node, *olds: fx.Node) -> None:
    """``new`` stands in the place of the first of these nodes, and does what all of them did."""
    take_halves(new, *olds)
    remember(new, module=module_path(olds[0]))
    locate(new, olds[0])


def module_path(node: fx.Node) -> str:
    """The path of the module that this node came from, or the node's name where it came from none."""
    if node.op == "call_module":
        return str(node.target)
    known = provenance(node).module
    if known is not None:
        return known
    stack = node.meta.get(_STACK)
    if stack:
        innermost = next(reversed(stack.values()))
        path = innermost[0] if isinstance(innermost, tuple) else str(innermost)
        if path:
            return str(path)
    return node.name
