"""concat-of-(conv-bn-act): a concat whose segments are normalised, so that its readers could normalise all of it at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure.graph.activations import activation_of
from bnrestructure.graph.ir import Normalise
from bnrestructure.graph.operations import MaxPooling, concat_of, pooling_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.patterns.pairs import can_normalise, is_conv, normalise_making

__all__ = ["NormalisedConcat", "normalised_concat"]

#: Activations that change nothing where they have been applied already: their value there, and their derivative where it counts.
_IDEMPOTENT = ("identity", "relu", "relu6")


@dataclass(frozen=True)
class NormalisedConcat:
    """A concat along channels that could be concatenated raw and normalised afterwards.

    A segment is (tensor, normalise): z of that normalise, or, where it is None, a tensor that the activation ``act`` leaves as it is.
    """

    concat: fx.Node
    segments: list[tuple[fx.Node, Normalise | None]]
    act: str


def normalised_concat(node: fx.Node) -> NormalisedConcat | None:
    """Inception's concat, and a one-shot aggregation's: at least one segment is normalised, and at least one reader can normalise.

    A concat that only another concat reads is taken for its segments. A segment's other readers must be able to normalise it, too:
    otherwise it is in memory anyway.
    """
    tensors = _flattened(node)
    if tensors is None or len(set(tensors)) != len(tensors):
        return None
    segments = [(tensor, normalise_making(tensor)) for tensor in tensors]
    sources = [normalise for _, normalise in segments if normalise is not None]
    acts = {normalise.act for normalise in sources}
    if len(acts) != 1:
        return None
    act = acts.pop()
    if not all(_fits(tensor, normalise, act) for tensor, normalise in segments):
        return None
    wanted = any(_normalises(reader, node, sources[0]) for reader in node.users)
    return NormalisedConcat(node, segments, act) if wanted else None


def _flattened(node: fx.Node) -> list[fx.Node] | None:
    """The segments of a concat, those of concats that nobody else reads in their place."""
    segments = concat_of(node)
    if segments is None:
        return None
    tensors: list[fx.Node] = []
    for segment in segments:
        inner = _flattened(segment) if set(segment.users) == {node} else None
        tensors += [segment] if inner is None else inner
    return tensors


def _fits(tensor: fx.Node, normalise: Normalise | None, act: str) -> bool:
    if provenance(tensor).changed_by is not None:
        return False
    if normalise is None:
        return act in _IDEMPOTENT and (act == "identity" or _is_activated(tensor, act))
    return all(concat_of(reader) is not None or _normalises(reader, tensor, normalise) for reader in tensor.users)


def _normalises(reader: fx.Node, z: fx.Node, normalise: Normalise) -> bool:
    """Whether ``reader`` could normalise z itself. ``normalise`` makes z, or, for a concat's z, one segment of it."""
    pooling = pooling_of(reader)
    return is_conv(reader) or (pooling is not None and pooling.input is z and can_normalise(normalise, pooling))


def _is_activated(tensor: fx.Node, act: str) -> bool:
    """Whether this tensor is a result of ``act``, or of nothing but maxima and concats of its results."""
    normalise = normalise_making(tensor)
    if normalise is not None:
        return normalise.act == act
    applied = activation_of(tensor)
    if applied is not None:
        return applied.name == act
    pooling = pooling_of(tensor)
    if isinstance(pooling, MaxPooling):
        return _is_activated(pooling.input, act)
    segments = concat_of(tensor)
    return segments is not None and all(_is_activated(segment, act) for segment in segments)
