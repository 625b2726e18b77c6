"""chain-readers: a tensor with several readers is passed from one to the next, so that its gradient accumulates in place.

Readers r1, r2, ... of x become a chain: r1 reads x and returns it, r2 reads that, and so on. Backward runs the other way: the last reader
makes the gradient, each earlier one adds to it inside its dgrad epilogue, and no separate add sweeps over memory. Readers that are not
fused nodes hang on the chain where they stand, behind an own gradient.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from bnrestructure.graph.chains import passed_on_by
from bnrestructure.graph.ir import ConcatBuffer, Conv, Link, OwnGradient, Residual, buffer_writer, end_of, fused_of
from bnrestructure.graph.memory_rules import maker_for_one
from bnrestructure.graph.order import depends_on
from bnrestructure.graph.provenance import locate
from bnrestructure.passes.base import Pass, Rule
from bnrestructure.patterns.fork import Fork, fork

__all__ = ["CHAIN_READERS", "chain_readers", "unchain"]


def chain_readers(match: Fork, *, own: bool = False) -> None:
    """Make a chain of a tensor's readers. ``own``: its gradient must arrive in memory that its producer may write to."""
    match = _with_private_gradient(match)
    chain = [*match.links, *([] if match.last is None else [match.last])]
    readers = sorted([*chain, *match.others])
    current, accumulated = match.tensor, own
    for reader in readers:
        if reader not in chain and accumulated and OwnGradient.of(current) is None:
            current = _own(current)
        if current is not match.tensor:
            reader.replace_input_with(match.tensor, current)
        link = fused_of(reader)
        # A copied segment at the chain's end makes the gradient that the links before it add to.
        if accumulated and (copy := ConcatBuffer.of(reader)) is not None and copy.x is current and OwnGradient.of(current) is None:
            copy.update(own=True)
        if reader in match.links and reader is not readers[-1] and isinstance(link, Link):
            current, accumulated = link.update(chain=True).out("passed"), True


def unchain(tensor: fx.Node) -> None:
    """Let every reader of a tensor read the tensor itself: what :func:`chain_readers` did, undone."""
    while True:
        passed = [(reader, again) for reader in tensor.users if (again := passed_on_by(reader, tensor)) is not None]
        if not passed:
            return
        for reader, again in passed:
            again.replace_all_uses_with(tensor)
            tensor.graph.erase_node(again)
            if again is not reader and isinstance(link := fused_of(reader), Link):
                link.update(chain=False)


def _own(tensor: fx.Node) -> fx.Node:
    """The tensor behind a node whose gradient arrives in memory of its own."""
    made = OwnGradient.create(after=end_of(tensor), x=tensor)
    locate(made.node, tensor)
    return made.node


def _with_private_gradient(match: Fork) -> Fork:
    """The fork, in which no link adds to a gradient that somebody else has yet to read.

    A residual at the end hands the producer of y the very gradient that the links write to. The producer has read it before if it is
    computed from all of them. Otherwise a residual with a gain hands out two; one that adds y as it is ends no chain, but hangs on it like
    a reader that is no fused node.
    """
    last = Residual.of(match.last)
    if last is None:
        return match
    gained = Conv.making(last.gain, "gain")
    producer = None if gained is None else gained.node
    if last.mean is None:
        producer = maker_for_one(last.y)
    if producer is None:
        return match
    if buffer_writer(match.tensor) is None and all(depends_on(producer, link) for link in match.links):
        return match
    if gained is None:
        return replace(match, last=None, others=[*match.others, last.node])
    last.update(gain=None)
    gained.update(gain=False)
    gained.node.graph.erase_node(gained.out("gain"))
    return match


CHAIN_READERS = Pass("chain-readers", (Rule(fork, chain_readers),))
