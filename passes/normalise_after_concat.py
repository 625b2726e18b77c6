"""A part of fuse-normalise: a concat of normalised tensors becomes the normalise of a concat, which its readers can apply."""

from __future__ import annotations

import torch
from torch import fx

from bnrestructure.graph.ir import Normalise, Unchanged
from bnrestructure.graph.operations import concat_of
from bnrestructure.graph.provenance import locate, remember, take_halves
from bnrestructure.patterns.normalised_concat import NormalisedConcat

__all__ = ["normalise_after_concat"]

_VECTORS = ("mean", "scale", "beta")


def normalise_after_concat(match: NormalisedConcat) -> None:
    """``cat([normalise(a), normalise(b)])`` -> ``normalise(cat([a, b]))``, whose vectors are the concats of theirs."""
    concat, graph = match.concat, match.concat.graph
    vectors = [_vectors_of(tensor, normalise, concat) for tensor, normalise in match.segments]
    with graph.inserting_before(concat):
        raw = graph.call_function(torch.cat, ([tensor if normalise is None else normalise.x for tensor, normalise in match.segments], 1))
        concatenated = {name: graph.call_function(torch.cat, ([of[name] for of in vectors],)) for name in _VECTORS}
    for vector in concatenated.values():
        remember(vector, vector=True)
    normalise = Normalise.create(before=concat, x=raw, **concatenated, act=match.act)
    sources = [source for _, source in match.segments if source is not None]
    take_halves(normalise.node, *(source.node for source in sources))
    for made in (raw, normalise.node):
        locate(made, concat)
    concat.replace_all_uses_with(normalise.out("z"))
    _erase_concat(concat)
    for source in sources:
        source.erase_if_unread()


def _vectors_of(tensor: fx.Node, normalise: Normalise | None, before: fx.Node) -> dict[str, fx.Node | None]:
    """mean, scale and beta of a segment: its normalise's, or those that change nothing."""
    if normalise is not None:
        return {name: normalise.edge[name] for name in _VECTORS}
    made = Unchanged.create(before=before, x=tensor)
    for node in (made.node, *(made.out(name) for name in _VECTORS)):
        remember(node, vector=True)
    return {name: made.out(name) for name in _VECTORS}


def _erase_concat(concat: fx.Node) -> None:
    """Erase a concat that nobody reads, and the concats that were segments of it alone."""
    inner = [segment for segment in concat.all_input_nodes if concat_of(segment) is not None]
    concat.graph.erase_node(concat)
    for segment in inner:
        if not segment.users:
            _erase_concat(segment)
