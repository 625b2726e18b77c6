"""A tensor that is passed from reader to reader: the tensor itself, and all who read it."""

from __future__ import annotations

from torch import fx

from bnrestructure.graph.ir import Link, OwnGradient, fused_of, maker_of
from bnrestructure.graph.order import readers_of

__all__ = ["aliases_of", "passed_on_by", "passed_tensor", "readers_along_chain"]


def passed_tensor(tensor: fx.Node) -> fx.Node:
    """The tensor that this one is, in front of all links that passed it on and of what makes its gradient its own."""
    while True:
        maker, output = maker_of(tensor)
        if isinstance(maker, OwnGradient) or (isinstance(maker, Link) and output == "passed" and maker.passes_x):
            tensor = maker.x
        else:
            return tensor


def passed_on_by(reader: fx.Node, tensor: fx.Node) -> fx.Node | None:
    """The node that is ``tensor`` again, for further readers, where this reader passes it on."""
    view = fused_of(reader)
    if isinstance(view, OwnGradient):
        return reader
    return view.outs().get("passed") if isinstance(view, Link) and view.passes_x and view.x is tensor else None


def aliases_of(tensor: fx.Node) -> list[fx.Node]:
    """A tensor, and what its readers pass on of it."""
    found = [tensor]
    for each in found:
        found += [again for reader in each.users if (again := passed_on_by(reader, each)) is not None]
    return found


def readers_along_chain(tensor: fx.Node) -> list[fx.Node]:
    """The nodes that compute with a tensor, those behind links of its chain among them."""
    aliases = aliases_of(tensor)
    return [reader for alias in aliases for reader in readers_of(alias) if reader not in aliases]
