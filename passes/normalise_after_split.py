"""A part of fuse-normalise: a split of a normalised tensor becomes the normalises of its parts, which their readers can apply."""

from __future__ import annotations

import operator

from torch import fx

from bnrestructure.graph.ir import Normalise
from bnrestructure.graph.provenance import locate, remember, take_halves
from bnrestructure.patterns.normalised_split import NormalisedSplit

__all__ = ["normalise_after_split"]


def normalise_after_split(match: NormalisedSplit) -> None:
    """``split(normalise(y))`` -> ``normalise(part)`` for each part of ``split(y)``; the vectors are split like the channels."""
    whole, split = match.normalise, match.split
    raw = split.again(whole.x, 1)
    vectors = {name: split.again(vector, 0) for name in ("mean", "scale", "beta") if (vector := whole.edge[name]) is not None}
    locate(raw, split.node)
    for vector in vectors.values():
        remember(vector, vector=True)
    for part, number in match.parts:
        edge = {name: _part(parts, number, part) for name, parts in vectors.items()}
        for vector in edge.values():
            remember(vector, vector=True)
        normalise = Normalise.create(before=part, x=_part(raw, number, part), **edge, act=whole.act)
        take_halves(normalise.node, whole.node)
        for made in (normalise.x, normalise.node):
            locate(made, part)
        part.replace_all_uses_with(normalise.out("z"))
        part.graph.erase_node(part)
    split.node.graph.erase_node(split.node)
    whole.erase_if_unread()


def _part(parts: fx.Node, number: int, before: fx.Node) -> fx.Node:
    with before.graph.inserting_before(before):
        return before.graph.call_function(operator.getitem, (parts, number))
