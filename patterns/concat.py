"""Concats along channels: of tensors whose statistics are known, and those whose segments can be written in place."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import fx

from bnrestructure.graph.chains import passed_tensor, readers_along_chain
from bnrestructure.graph.channels import channels_of
from bnrestructure.graph.inplace import storages_of
from bnrestructure.graph.ir import Conv, Normalise, Statistics, Writer, fused_of
from bnrestructure.graph.layers import shape_of
from bnrestructure.graph.operations import add_of, concat_of
from bnrestructure.graph.order import readers_of
from bnrestructure.graph.provenance import known_tensor, provenance
from bnrestructure.graph.targets import called_name
from bnrestructure.ops.formats import returned
from bnrestructure.patterns.base import Refusal

__all__ = ["BranchConcat", "ConcatStatistics", "GrowingConcat", "branch_concat", "concat_statistics", "growing_concat", "keeps_for_all"]

#: Eager copies what these lay out anew. A buffer may be laid out so already.
_LAYS_OUT = {"contiguous", "to", "type", "type_as"}


@dataclass(frozen=True)
class ConcatStatistics:
    """concat -> statistics: the statistics of a concat are those of its segments."""

    statistics: Statistics
    segments: list[fx.Node]


@dataclass(frozen=True)
class GrowingConcat:
    """concat-bn-act-conv, over and over: ``concats[i]`` is of ``base`` and the first ``lengths[i]`` of the ``appended`` tensors.

    ``convs`` make the appended tensors, of ``extra_channels`` channels together. Those that get out are to be ``copied``.
    """

    base: fx.Node
    appended: list[fx.Node]
    convs: list[Conv]
    concats: list[fx.Node]
    lengths: list[int]
    extra_channels: int
    copied: set[fx.Node]


@dataclass(frozen=True)
class BranchConcat:
    """One concat of branches, as (what is written, first channel) in the order in which the graph computes the segments: those that can be
    ``written`` into the buffer by the nodes that make them, at least one, and those that must be ``copied``.
    """

    concat: fx.Node
    written: list[tuple[Writer, int]]
    copied: list[tuple[fx.Node, int]]
    channels: int


def concat_statistics(node: fx.Node) -> ConcatStatistics | None:
    """Statistics of a concat along channels."""
    statistics = Statistics.of(node)
    segments = None if statistics is None else _segments(statistics.x)
    return None if statistics is None or segments is None else ConcatStatistics(statistics, segments)


def _segments(node: fx.Node) -> list[fx.Node] | None:
    """The segments of a concat of activations. What something changes in place must be read where the concat reads it."""
    segments = None if provenance(node).vector else concat_of(node)
    changed = segments is not None and any(provenance(segment).changed_by is not None for segment in segments)
    return None if changed else segments


def _writes_alone(tensor: fx.Node, readers: set[fx.Node]) -> Conv | None:
    """The fused convolution behind ``tensor`` if it could write elsewhere: no one but ``readers``, concats, reads the tensor."""
    conv = Conv.making(tensor, "y")
    if conv is None or conv.in_buffer or conv.gain or not tensor.users.keys() <= readers:
        return None
    weight, known = shape_of(conv.weight), [known_tensor(reader) for reader in readers]
    batched = weight is None or all(whole is None or len(whole.shape) == len(weight) for whole in known)
    return conv if batched else None


def _gets_out(concat: fx.Node) -> bool:
    """Whether code that is not in the graph may get this concat's memory: the caller, or what is called as it is; whole or in part."""
    return any(_hands_out(reader, concat) for reader in concat.users)


def _hands_out(reader: fx.Node, concat: fx.Node) -> bool:
    if reader.op == "output" or reader.target is returned:
        return True
    return called_name(reader) in _LAYS_OUT or bool(storages_of(reader) & storages_of(concat))


def growing_concat(node: fx.Node) -> GrowingConcat | None:
    """A family of concats each of which starts with all segments of the one before it, found at the first.

    One that others get is copied out of the buffer, so there is something to gain where two are not.
    """
    own = _segments(node)
    if own is None:
        return None
    base = own[0]
    family = [(concat, s) for concat in readers_of(base) if (s := _segments(concat)) is not None and s[0] is base]
    if len(family) < 2 or family[0][0] is not node:
        return None
    family.sort(key=lambda member: len(member[1]))
    longest = family[-1][1]
    appended = longest[1:]
    if any(segments != longest[: len(segments)] for _, segments in family) or len(set(longest)) < len(longest):
        return None
    if any(len(one) == len(other) for (_, one), (_, other) in pairwise(family)):
        return None  # one concat, made twice: each has a chain of readers of its own
    concats = [concat for concat, _ in family]
    copied = {concat for concat in concats if _gets_out(concat)}
    if len(concats) - len(copied) < 2:
        return None
    convs = [conv for tensor in appended if (conv := _writes_alone(tensor, set(concats))) is not None]
    counts = [count for tensor in appended if (count := channels_of(tensor)) is not None]
    if not appended or not len(convs) == len(counts) == len(appended):
        return None
    # The buffer starts with the base, and each convolution writes right behind the one before it.
    writers = [base, *(conv.node for conv in convs)]
    in_order = all(a < b for a, b in pairwise(writers))
    filled = all(writers[len(segments) - 1] < concat for concat, segments in family)
    if not in_order or not filled:
        return None
    lengths = [len(segments) - 1 for _, segments in family]
    return GrowingConcat(base, appended, convs, concats, lengths, sum(counts), copied)


def branch_concat(node: fx.Node) -> BranchConcat | Refusal | None:
    """A concat with at least one segment that the convolution or the normalise that makes it could write in place."""
    segments = _segments(node)
    if segments is None or len(segments) < 2 or len(set(segments)) < len(segments):
        return None
    writers = [_writes_alone(segment, {node}) or _writes_for_all(segment, node) for segment in segments]
    if all(writer is None for writer in writers):
        return None
    counts = [count for segment in segments if (count := channels_of(segment)) is not None]
    if len(counts) < len(segments):
        return Refusal(node, "the channels of a segment are not known before the model runs")
    *offsets, channels = accumulate(counts, initial=0)
    places = list(zip(segments, offsets, writers, strict=True))
    written: list[tuple[Writer, int]] = [(writer, offset) for _, offset, writer in places if writer is not None]
    written.sort(key=lambda place: place[0].node)
    copied = [(tensor, offset) for tensor, offset, writer in sorted(places, key=lambda place: place[0]) if writer is None]
    return BranchConcat(node, written, copied, channels)


def _writes_for_all(segment: fx.Node, concat: fx.Node) -> Normalise | None:
    """The normalise behind ``segment`` if its result could be a slice of the concat, for all who read it.

    Those readers must take a tensor of any strides, and must not hand it to the caller. Where there are such readers the concat must not
    get out either: who gets it may change it in place, and the slice with it.
    """
    z = passed_tensor(segment)
    normalise = Normalise.making(z, "z")
    if normalise is None or normalise.in_buffer:
        return None
    others = [reader for reader in readers_along_chain(z) if reader is not concat]
    if others and _gets_out(concat):
        return None
    return normalise if all(_takes_any_strides(reader) for reader in others) else None


def keeps_for_all(z: fx.Node) -> bool:
    """Whether a normalised tensor is to be a slice of a concat that all its readers can read."""
    concats = [reader for reader in z.users if concat_of(reader) is not None]
    return bool(concats) and all(_writes_for_all(z, concat) is not None for concat in concats)


def _takes_any_strides(reader: fx.Node) -> bool:
    return fused_of(reader) is not None or concat_of(reader) is not None or add_of(reader) is not None
