"""concat-of-(conv-bn-act): a concat whose segments are normalised, so that its readers could normalise all of it at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from bnrestructure import ops
from bnrestructure.graph.fused import produced_by
from bnrestructure.graph.layers import modules_of
from bnrestructure.graph.operations import activation_of, concat_of, max_pool_of
from bnrestructure.patterns.normalise import is_convolution
from bnrestructure.patterns.pool import pool_reader

__all__ = ["NormalisedConcat", "find_normalised_concats"]

#: Activations that change nothing where they have been applied already: their value there, and their derivative where it counts.
_IDEMPOTENT = ("identity", "relu", "relu6")


@dataclass(frozen=True)
class NormalisedConcat:
    """A concat along channels that could be concatenated raw and normalised afterwards.

    A segment is (tensor, normalise): z of that normalise, or, where it is None, a tensor that the activation ``act`` leaves as it is.
    """

    concat: fx.Node
    segments: list[tuple[fx.Node, fx.Node | None]]
    act: str


def find_normalised_concats(gm: fx.GraphModule) -> Iterator[NormalisedConcat]:
    """Inception's join, and a one-shot aggregation's: at least one segment is normalised, and at least one reader can normalise.

    A concat that only another concat reads is taken for its segments. A segment's other readers must be able to normalise it, too:
    otherwise it is in memory anyway.
    """
    modules = modules_of(gm)
    for node in gm.graph.nodes:
        tensors = _flattened(node)
        if tensors is None or len(set(tensors)) != len(tensors):
            continue
        segments = [(tensor, produced_by(tensor, ops.normalise, "z")) for tensor in tensors]
        sources = [normalise for _, normalise in segments if normalise is not None]
        acts = {str(normalise.kwargs["act"]) for normalise in sources}
        if len(acts) != 1:
            continue
        act = acts.pop()
        if not all(_fits(tensor, normalise, act, modules) for tensor, normalise in segments):
            continue
        if any(_normalises(reader, node, sources[0], modules) for reader in node.users):
            yield NormalisedConcat(node, segments, act)


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


def _fits(tensor: fx.Node, normalise: fx.Node | None, act: str, modules: dict[str, nn.Module]) -> bool:
    if "bnr_shared" in tensor.meta:
        return False
    if normalise is None:
        return act in _IDEMPOTENT and (act == "identity" or _is_activated(tensor, act, modules))
    return all(concat_of(reader) is not None or _normalises(reader, tensor, normalise, modules) for reader in tensor.users)


def _normalises(reader: fx.Node, z: fx.Node, normalise: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``reader`` could normalise z itself. ``normalise`` makes z, or, for a concat's z, one segment of it."""
    return is_convolution(reader, modules) or pool_reader(reader, normalise, z, modules) is not None


def _is_activated(tensor: fx.Node, act: str, modules: dict[str, nn.Module]) -> bool:
    """Whether this tensor is a result of ``act``, or of nothing but maxima and concats of its results."""
    normalise = produced_by(tensor, ops.normalise, "z")
    if normalise is not None:
        return str(normalise.kwargs["act"]) == act
    applied = activation_of(tensor, modules)
    if applied is not None:
        return applied[0] == act
    pool = max_pool_of(tensor, modules)
    if pool is not None:
        return _is_activated(pool["input"], act, modules)
    segments = concat_of(tensor)
    return segments is not None and all(_is_activated(segment, act, modules) for segment in segments)
