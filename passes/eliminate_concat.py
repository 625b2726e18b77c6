"""eliminate-concat: producers write their channel slice of one buffer; the gradient accumulates in place the same way (ICF).

``cat([a, conv1(..), conv2(..)])`` -> convolutions that write into one preallocated buffer, one after the other; so do normalises, whose
other readers then read a slice of the buffer. A dense block's growing concats all become prefixes of the same buffer. Each prefix has two
readers, the next layer and the next writer, and becomes a chain of them: its gradient is one tensor, added to in place.
"""

from __future__ import annotations

import torch
from torch import fx

from bnrestructure.graph.ir import ConcatBuffer, Normalise, OwnGradient, Squeeze, end_of, fused_of
from bnrestructure.graph.provenance import locate
from bnrestructure.passes.base import Pass, Rule, erase_dead
from bnrestructure.passes.chain_readers import chain_readers, unchain
from bnrestructure.patterns.concat import BranchConcat, GrowingConcat, branch_concat, growing_concat
from bnrestructure.patterns.fork import Fork, fork, fork_at

__all__ = ["ELIMINATE_CONCAT"]


def grow(match: GrowingConcat) -> None:
    """One buffer that starts with the base, and behind it what each convolution appends; the concats are what it holds so far."""
    buffer = ConcatBuffer.create(before=min(match.convs[0].node, *match.concats), x=match.base, extra=match.extra_channels)
    locate(buffer.node, match.concats[0])
    prefixes = [buffer.node, *match.appended]
    for conv, prefix in zip(match.convs, prefixes, strict=False):
        conv.update(into=prefix, offset=None)
    for concat, length in zip(match.concats, match.lengths, strict=True):
        whole = prefixes[length]
        if concat in match.copied:  # who gets it may change it in place, and others keep the buffer for backward
            whole = _copied(whole, concat)
        concat.replace_all_uses_with(whole)
        concat.graph.erase_node(concat)
    _chain_if_fork(match.base)
    for prefix in prefixes:
        readers = fork_at(prefix)
        if not _hands_back_its_own(readers):
            chain_readers(readers, own=True)


def _copied(tensor: fx.Node, place: fx.Node) -> fx.Node:
    """The tensor as a concat of its own, where one is now."""
    with place.graph.inserting_before(place):
        made = place.graph.call_function(torch.cat, ([tensor], 1))
    made.meta = dict(place.meta)
    return made


def _hands_back_its_own(readers: Fork) -> bool:
    """Whether a tensor has a single reader, and one whose gradient is in memory of its own."""
    only = [*readers.links, *readers.others] if readers.last is None else []
    return len(only) == 1 and (only == readers.links or Squeeze.of(only[0]) is not None)


def write_branches(match: BranchConcat) -> None:
    """One buffer for a concat of branches: each convolution and normalise writes its slice, the other segments are copied."""
    normalised = [z for writer, _ in match.written if isinstance(writer, Normalise) and (z := writer.outs().get("z")) is not None]
    for z in normalised:
        unchain(z)  # the concat may hang on its chain
    buffer: fx.Node | None = None
    for writer, offset in match.written:
        place = {"channels": match.channels} if buffer is None else {"into": buffer}
        buffer = writer.update(**place, offset=offset, visible=match.channels).out(writer.buffer_output)
    assert buffer is not None  # at least one segment is written
    sources = [_without_own_gradient(tensor) for tensor, _ in match.copied]
    for tensor, (segment, offset) in zip(sources, match.copied, strict=True):
        # Behind the links that read the tensor: what the copy hands back is then the first part of its gradient.
        links = [view for link in fork_at(tensor).links if link < match.concat and (view := fused_of(link)) is not None]
        after = max(end_of(tensor), end_of(buffer), *(view.last for view in links if view.outs()))
        copy = ConcatBuffer.create(after=after, x=tensor, offset=offset, into=buffer, own=tensor is not segment)
        locate(copy.node, match.concat)
        buffer = copy.node
    match.concat.replace_all_uses_with(buffer)
    erase_dead(*normalised, *(tensor for tensor, _ in match.copied if OwnGradient.of(tensor) is not None), match.concat)
    for tensor in [*sources, *(z for z in normalised if z.users), buffer]:
        _chain_if_fork(tensor)


def _without_own_gradient(tensor: fx.Node) -> fx.Node:
    """What a copied segment is a copy of: the copy can hand back a gradient in memory of its own, and needs no node in front for that."""
    own = OwnGradient.of(tensor)
    return own.x if own is not None and len(tensor.users) == 1 else tensor


def _chain_if_fork(tensor: fx.Node) -> None:
    found = fork(tensor)
    if found is not None:
        chain_readers(found)


ELIMINATE_CONCAT = Pass("eliminate-concat", (Rule(growing_concat, grow), Rule(branch_concat, write_branches)))
