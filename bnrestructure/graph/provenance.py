"""What a node of a graph remembers of the model that it came from: one object, under one key of ``node.meta``.

Capture and Dynamo put two keys of torch.fx's own beside it, ``nn_module_stack`` and ``example_value``; a replacement takes over the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

__all__ = ["Provenance", "carry", "locate", "module_path", "provenance", "remember", "take_halves"]

_KEY, _STACK = "provenance", "nn_module_stack"


@dataclass(frozen=True)
class Provenance:
    """Where a node came from, and which halves of which batch norms it does. A site is one call of a batch norm layer, by name.

    module              path of the module that the node was a call of, or that its forward() made it in
    site                the site whose batch norm this node is: whole, or its finalize
    statistics_of       the sites whose statistics this node takes
    normalises          the sites whose normalisation this node applies
    shared_statistics   the statistics are of one segment of a concat, and the sites in question put several together
    changed_by          the in-place operation that changes memory which this node's tensor may share: patterns keep away
    functionalised      the node was an in-place operation
    vector              the node makes per-channel vectors [C], no activation
    """

    module: str | None = None
    site: str | None = None
    statistics_of: tuple[str, ...] = ()
    normalises: tuple[str, ...] = ()
    shared_statistics: bool = False
    changed_by: str | None = None
    functionalised: bool = False
    vector: bool = False


_NOTHING = Provenance()


def provenance(node: fx.Node) -> Provenance:
    """What this node remembers."""
    found: Provenance = node.meta.get(_KEY, _NOTHING)
    return found


def remember(node: fx.Node, **changes: Any) -> None:
    """Change some of what a node remembers, by the names of :class:`Provenance`'s members."""
    node.meta[_KEY] = replace(provenance(node), **changes)


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
