"""Rules about memory that several nodes share: the gradient that a chain adds to, the buffer that a concat's writers fill.

Whoever writes comes after all who must have read. Backward runs against the edges: a node's backward comes after that of every node that
is computed from it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from bnrestructure.graph.chains import aliases_of
from bnrestructure.graph.channels import channels_of
from bnrestructure.graph.invariant import Invariant, Look
from bnrestructure.graph.ir import (
    BatchNorm,
    ConcatBuffer,
    Conv,
    Link,
    Normalise,
    OwnGradient,
    Reader,
    Residual,
    Statistics,
    Writer,
    buffer_writer,
    maker_of,
)
from bnrestructure.graph.layers import ConvLayer, conv_of, shape_of
from bnrestructure.graph.order import depends_on, readers_of
from bnrestructure.graph.view import Fused

__all__ = ["MEMORY_RULES", "maker_for_one"]

#: Nodes whose gradient of their input is in memory that they allocate.
_HAND_BACK_THEIR_OWN = (Reader, Statistics, Residual, ConcatBuffer, OwnGradient, BatchNorm)


def chain(view: Link, look: Look) -> str | None:
    """A link passes its input on, and somebody reads that; no other link reads the input."""
    if not view.chain:
        return None
    passed = look.outs(view).get("passed")
    if passed is None or not passed.users:
        return "nobody reads what it passes on"
    if not view.passes_x:
        return None
    others = (look.at(reader) for reader in view.x.users)
    links = [link.node.name for link in others if isinstance(link, Link) and link.passes_x and link.x is view.x]
    return f"{' and '.join(links)} are both links at {view.x.name}" if len(links) > 1 else None


def own_gradient(view: Link, look: Look) -> str | None:
    """A link adds to the gradient of what it passes on: that gradient arrives in memory which is nobody else's."""
    foreign = _foreign_reader(look.outs(view)["passed"], look) if view.chain else None
    return None if foreign is None else f"the gradient that it adds to is {foreign.name}'s, which may have handed it to others, too"


def _foreign_reader(tensor: fx.Node, look: Look) -> fx.Node | None:
    """A reader whose gradient of this tensor may be in anybody's memory. What writes into a buffer hands down a slice of the buffer's."""
    tensors = [tensor]
    for read in tensors:
        for reader in readers_of(read):
            view = look.at(reader)
            if isinstance(view, Writer | ConcatBuffer) and view.into is read:
                buffer = _buffer(view, look)
                tensors += [] if buffer is None else [buffer]
            elif not (isinstance(view, _HAND_BACK_THEIR_OWN) and _has_own_gradient(view, read)):
                return reader
    return None


def _has_own_gradient(view: Any, read: fx.Node) -> bool:
    """Whether such a node's gradient of this operand is its own: not that of what a normalise adds, which is its result's, nor that of a
    copied segment, unless it was asked for.
    """
    if isinstance(view, ConcatBuffer):
        return view.own and view.x is read
    if isinstance(view, Normalise) and view.r is read:
        return False
    return view.input is read or getattr(view, "r", None) is read


def shared_gradient(view: Residual | Conv, look: Look) -> str | None:
    """A residual shares one gradient between the producer of y and the shortcut: with a gain, and where it adds y as it is. Links behind
    the shortcut add to it after the producer has read it: its backward comes first if it is computed from them.
    """
    y, gain = (view.y, view.gain) if isinstance(view, Residual) else (view.x, view.x_gain)
    if view.r is None or view.r_mean is not None:
        return None
    gained = Conv.making(gain, "gain")
    producer = None if gained is None else gained.node
    if view.mean is None:
        producer = maker_for_one(y)
        if producer is None:
            return f"whoever makes {y.name} may hand on the gradient that it shares with the shortcut"
    if producer is None:
        return None
    for link in _links_behind(view.r):
        if not depends_on(producer, link):
            return f"{link.name} adds to a gradient that is shared with {producer.name}, which may not have read it yet"
    return None


def maker_for_one(tensor: fx.Node) -> fx.Node | None:
    """The node that makes a tensor for one reader, and reads the gradient of it in its own backward alone; not what hands gradients on."""
    if len(tensor.users) != 1:
        return None
    match maker_of(tensor):
        case (Conv(in_buffer=False) | Normalise(r=None) | Residual()) as maker, "y" | "z" | "out":
            return maker.node
        case BatchNorm() as maker, None:
            return maker.node
        case None, _:
            return tensor if isinstance(conv_of(tensor), ConvLayer) or tensor.target in (operator.mul, torch.mul) else None
    return None


def _links_behind(tensor: fx.Node) -> Iterator[fx.Node]:
    """The links that add to the gradient of this tensor where it lies, those below a buffer of which it is the last state included."""
    while True:
        maker, output = maker_of(tensor)
        if isinstance(maker, Link) and output == "passed":
            yield maker.node
            if not maker.passes_x:
                return  # it made the sum that it passes on
            tensor = maker.x
        else:
            writer = buffer_writer(tensor)
            if writer is None or writer.into is None:
                return
            tensor = writer.into


def one_writer(view: Writer | ConcatBuffer, look: Look) -> str | None:
    """What is in a buffer so far has one writer behind it: two would write the same channels."""
    buffer = _buffer(view, look)
    writers = [] if buffer is None else list(_writers_into(buffer, look))
    return f"{' and '.join(writer.node.name for writer in writers)} both write behind it" if len(writers) > 1 else None


def extent(view: Writer | ConcatBuffer, look: Look) -> str | None:
    """The slices that are written into a buffer are inside of it, and none overlaps another. Found at the node that makes the buffer."""
    capacity = _capacity(view)
    if capacity is None:
        return None
    taken: list[tuple[int, int, str]] = []
    end = 0
    writer: Writer | ConcatBuffer | None = view
    while writer is not None:
        count = _written(writer)
        if count is None:
            return None
        start = end if writer.offset is None else writer.offset
        end = max(end, start + count)
        if end > capacity:
            return f"{writer.node.name} writes up to channel {end} of a buffer of {capacity}"
        overlapped = next((name for low, high, name in taken if low < start + count and start < high), None)
        if overlapped is not None:
            return f"{writer.node.name} writes over channels of {overlapped}"
        taken.append((start, start + count, writer.node.name))
        writer = next(_writers_into(_buffer(writer, look), look), None)
    return None


def unfinished(view: Writer | ConcatBuffer, look: Look) -> str | None:
    """A buffer that shows channels which are still to be written is read by the next writer alone."""
    buffer = _buffer(view, look)
    grows = view.appends if isinstance(view, Writer) else bool(view.extra)
    writers = [] if buffer is None or grows else list(_writers_into(buffer, look))
    if buffer is None or not writers:
        return None
    others = [reader.name for reader in buffer.users if reader not in [writer.node for writer in writers]]
    return f"{others[0]} reads it before {writers[0].node.name} has written" if others else None


def _buffer(view: Fused, look: Look) -> fx.Node | None:
    """The node that is the buffer after this write."""
    if isinstance(view, Writer):
        return look.outs(view).get(view.buffer_output) if view.in_buffer else None
    return view.node if isinstance(view, ConcatBuffer) else None


def _writers_into(buffer: fx.Node | None, look: Look) -> Iterator[Writer | ConcatBuffer]:
    """The nodes that write into a buffer as it is at this node."""
    for alias in [] if buffer is None else aliases_of(buffer):
        for reader in alias.users:
            view = look.at(reader)
            if isinstance(view, Writer | ConcatBuffer) and view.into is alias:
                yield view


def _written(view: Writer | ConcatBuffer) -> int | None:
    """How many channels a node writes, where that is known before the model runs."""
    if not isinstance(view, Conv):
        return channels_of(view.x)
    shape = shape_of(view.weight)
    return None if shape is None else shape[0]


def _capacity(view: Writer | ConcatBuffer) -> int | None:
    """The channels of the buffer that this node makes; None where it makes none, or nobody knows."""
    if view.into is not None:
        return None
    if isinstance(view, ConcatBuffer) and view.extra:
        own = channels_of(view.x)
        return None if own is None else own + view.extra
    return view.channels or None


MEMORY_RULES = (
    Invariant("chain", (Link,), chain),
    Invariant("own gradient", (Link,), own_gradient),
    Invariant("shared gradient", (Residual, Conv), shared_gradient),
    Invariant("one writer", (Conv, Normalise, ConcatBuffer), one_writer),
    Invariant("extent", (Conv, Normalise, ConcatBuffer), extent),
    Invariant("unfinished buffer", (Conv, Normalise, ConcatBuffer), unfinished),
)
