"""Concats along channels whose segments can be written in place: dense blocks that grow, and plain joins of branches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.channels import channels_of
from bnrestructure.graph.fused import produced_by
from bnrestructure.graph.layers import modules_of
from bnrestructure.graph.operations import concat_of
from bnrestructure.patterns.base import Refusal

__all__ = ["BranchConcat", "GrowingConcat", "find_branch_concats", "find_growing_concats"]


@dataclass(frozen=True)
class GrowingConcat:
    """concat-bn-act-conv, over and over: ``concats[i]`` joins ``base`` and the first ``lengths[i]`` of the ``appended`` tensors."""

    base: fx.Node
    appended: list[fx.Node]
    concats: list[fx.Node]
    lengths: list[int]
    extra_channels: int


@dataclass(frozen=True)
class BranchConcat:
    """One concat of branches, as (tensor, first channel) in the order in which the graph computes them: segments that can be ``written``
    into the buffer by the convolutions that make them, at least one, and those that must be ``copied``.
    """

    concat: fx.Node
    written: list[tuple[fx.Node, int]]
    copied: list[tuple[fx.Node, int]]
    channels: int


def _concats(gm: fx.GraphModule) -> list[tuple[fx.Node, list[fx.Node]]]:
    pairs = ((node, concat_of(node)) for node in gm.graph.nodes if "bnr_vector" not in node.meta)
    # A segment that something changes in place must be read where the concat reads it, neither earlier nor later.
    return [(n, segments) for n, segments in pairs if segments is not None and not any("bnr_shared" in s.meta for s in segments)]


def _writes_alone(tensor: fx.Node, readers: set[fx.Node]) -> fx.Node | None:
    """The fused convolution behind ``tensor`` if it could write elsewhere: no one but ``readers`` reads the tensor."""
    conv = produced_by(tensor, ops.conv, "y")
    if conv is None or conv.kwargs["into"] is not None or conv.kwargs["channels"] is not None:
        return None
    if conv.kwargs["gain"] or not set(tensor.users) <= readers:
        return None
    return conv


def find_growing_concats(gm: fx.GraphModule) -> list[GrowingConcat]:
    """Families of concats each of which starts with all segments of the one before it."""
    modules = modules_of(gm)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    families: dict[fx.Node, list[tuple[fx.Node, list[fx.Node]]]] = {}
    for node, segments in _concats(gm):
        families.setdefault(segments[0], []).append((node, segments))
    found = []
    for base, members in families.items():
        members.sort(key=lambda member: len(member[1]))
        longest = members[-1][1]
        if len(members) < 2 or any(segments != longest[: len(segments)] for _, segments in members):
            continue
        appended = longest[1:]
        concats = {node for node, _ in members}
        convs = [_writes_alone(segment, concats) for segment in appended]
        counts = [channels_of(segment, modules) for segment in appended]
        if not appended or any(c is None for c in convs) or any(c is None for c in counts) or len(set(longest)) < len(longest):
            continue
        places = [position[conv] for conv in convs if conv is not None]
        if places != sorted(places) or position[base] > places[0]:
            continue  # the buffer starts with the base: the base must be there before anyone writes behind it
        first_read = {segment: i for i, segment in enumerate(appended)}
        ordered = all(
            position[node] > position[conv]
            for node, segments in members
            for conv in convs[: len(segments) - 1]
        )
        if ordered and len(first_read) == len(appended):
            lengths = [len(segments) - 1 for _, segments in members]
            total = sum(c for c in counts if c is not None)
            found.append(GrowingConcat(base, appended, [node for node, _ in members], lengths, total))
    return found


def find_branch_concats(gm: fx.GraphModule) -> list[BranchConcat | Refusal]:
    """Concats with at least one segment that its convolution could write in place."""
    modules = modules_of(gm)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: list[BranchConcat | Refusal] = []
    for node, segments in _concats(gm):
        direct = [_writes_alone(segment, {node}) for segment in segments]
        if all(conv is None for conv in direct) or len(segments) < 2 or len(set(segments)) < len(segments):
            continue
        counts = [channels_of(segment, modules) for segment in segments]
        if any(count is None for count in counts):
            found.append(Refusal(node, "the channels of a segment are not known before the model runs"))
            continue
        offsets, total = [], 0
        for count in counts:
            offsets.append(total)
            total += count or 0
        placed = sorted(zip(segments, offsets, direct, strict=True), key=lambda place: position[place[0]])
        written = [(tensor, offset) for tensor, offset, conv in placed if conv is not None]
        copied = [(tensor, offset) for tensor, offset, conv in placed if conv is None]
        found.append(BranchConcat(node, written, copied, total))
    return found
