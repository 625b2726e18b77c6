"""share-statistics: each channel's statistics are computed once, however many batch norms read the channel.

The statistics of a concat become the concat of its segments' statistics; equal statistics become one. Growing concats ([a], [a, b],
[a, b, c] ... of a dense block) grow the per-channel vectors the same way, one segment a time: each batch norm makes the concat of what it
is handed and of what is new, and hands it on, so that no concat is a step of its own and the gradients add up where they are made.
"""

from __future__ import annotations

import torch
from torch import fx

from bnrestructure.graph.ir import Finalize, Statistics
from bnrestructure.graph.provenance import locate, provenance, remember, take_halves
from bnrestructure.passes.base import Pass, Rule, erase_dead
from bnrestructure.patterns.concat import ConcatStatistics, concat_statistics
from bnrestructure.patterns.statistics_readers import StatisticsReaders, statistics_readers

__all__ = ["SHARE_STATISTICS"]


def from_segments(match: ConcatStatistics) -> None:
    """Put the statistics of the segments in the place of the concat's."""
    statistics = match.statistics
    parts = [_statistics_of(segment, statistics.node) for segment in match.segments]
    items = statistics.outs()
    for name in ("mean", "var"):
        if name in items:
            items[name].replace_all_uses_with(_grown([part.out(name) for part in parts]))
    if "size" in items:
        items["size"].replace_all_uses_with(parts[0].out("size"))
    sites = provenance(statistics.node).statistics_of
    for part in parts:
        remember(part.node, statistics_of=provenance(part.node).statistics_of + sites, shared_statistics=True)
    statistics.erase()


def _statistics_of(segment: fx.Node, before: fx.Node) -> Statistics:
    """The statistics node of this tensor: an existing one if it stands before ``before``, else a new one behind the tensor.

    A tensor that is a fused node's output already carrying statistics is left to fuse-statistics, which drops duplicates.
    """
    for user in reversed(segment.users):  # where there is one, it was made last
        existing = Statistics.of(user)
        if existing is not None and user < before:
            return existing
    position = segment
    while position.next.op in ("placeholder", "get_attr"):
        position = position.next
    made = Statistics.create(after=position, x=segment)
    locate(made.node, segment)
    return made


def _grown(parts: list[fx.Node]) -> fx.Node:
    """The concat of per-channel vectors, as [the concat of all but the last] + [the last], sharing what is there already."""
    vector = parts[0]
    for part in parts[1:]:
        existing = (user for user in vector.users if user.target is torch.cat and user.args and user.args[0] == [vector, part])
        vector = next(existing, None) or _appended(vector, part)
    return vector


def _appended(vector: fx.Node, part: fx.Node) -> fx.Node:
    with part.graph.inserting_after(max(vector, part)):
        made = part.graph.call_function(torch.cat, ([vector, part],))
    remember(made, vector=True)
    return made


def equal_statistics(node: fx.Node) -> tuple[Statistics, Statistics] | None:
    """Two statistics nodes of one tensor, found at the later one: (the one to keep, the other)."""
    statistics = Statistics.of(node)
    if statistics is None:
        return None
    of_same = [other for user in statistics.x.users if (other := Statistics.of(user)) is not None]
    first = min(of_same, key=lambda other: other.node)
    return None if first.node is node else (first, statistics)


def merge(match: tuple[Statistics, Statistics]) -> None:
    """Let the readers of the second read the first."""
    kept, other = match
    for name, item in other.outs().items():
        item.replace_all_uses_with(kept.out(name))
    take_halves(kept.node, other.node)
    other.erase()


def hand_on(match: StatisticsReaders) -> None:
    """Let a batch norm make the concat that it reads, and hand its statistics to those who read them after it."""
    finalize, whole = match.first, {"mean": match.first.mean, "var": match.first.var}
    if match.parts is not None:
        (mean, behind_mean), (var, behind_var) = match.parts
        finalize = finalize.update(mean=mean, var=var, behind_mean=behind_mean, behind_var=behind_var)
    if match.later:
        finalize = finalize.update(chain=True)
    for name, vector in whole.items():
        for reader in match.later & set(vector.users):
            reader.replace_input_with(vector, finalize.out(f"passed_{name}"))
    erase_dead(*whole.values() if match.parts is not None else ())


SHARE_STATISTICS = Pass(
    "share-statistics",
    (
        Rule(concat_statistics, from_segments, at=Statistics),
        Rule(equal_statistics, merge, at=Statistics),
        Rule(statistics_readers, hand_on, at=Finalize),
    ),
)
