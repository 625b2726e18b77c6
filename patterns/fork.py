"""Forks: one tensor with several readers, of which at least two are fused nodes that can pass it on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import THREADABLE, is_fused, outputs_of, tensor_readers

__all__ = ["Fork", "find_forks", "fork_at", "readers_of"]


@dataclass(frozen=True)
class Fork:
    """A tensor and its readers in graph order: ``links`` are fused nodes that read it as ``x`` and can thread it,
    ``last`` is a fused node that reads it and ends the thread (a residual's shortcut, a concat), ``others`` read it in place.
    """

    tensor: fx.Node
    links: list[fx.Node]
    last: fx.Node | None
    others: list[fx.Node]


def _can_link(reader: fx.Node, tensor: fx.Node) -> bool:
    if not (is_fused(reader) and reader.target in THREADABLE) or reader.kwargs.get("r") is not None:
        return False  # what forms a residual join passes on the sum, not its input
    uses = [v for v in reader.kwargs.values() if v is tensor]
    return reader.kwargs.get("x") is tensor and len(uses) == 1 and "x" not in outputs_of(reader)


def _can_end(reader: fx.Node, tensor: fx.Node) -> bool:
    if is_fused(reader, ops.residual):
        return reader.kwargs["r"] is tensor and reader.kwargs["y"] is not tensor and reader.kwargs["r_gain"] is None
    if is_fused(reader, ops.conv):
        return reader.kwargs.get("into") is tensor and reader.kwargs["x"] is not tensor
    if is_fused(reader, ops.concat_buffer):
        return tensor in (reader.kwargs.get("into"), reader.args[0] if reader.args else reader.kwargs.get("x"))
    return False


def readers_of(tensor: fx.Node) -> Fork:
    """The readers of this tensor, sorted by what a thread can do with them."""
    readers = tensor_readers(tensor)
    links = [r for r in readers if _can_link(r, tensor)]
    ends = [r for r in readers if r not in links and _can_end(r, tensor)]
    last = ends[-1] if ends else None
    return Fork(tensor, links, last, [r for r in readers if r not in links and r is not last])


def fork_at(tensor: fx.Node) -> Fork | None:
    """The fork at this tensor, or None when threading it would gain nothing."""
    if tensor.op in ("get_attr", "output") or "bnr_shared" in tensor.meta or len(tensor.users) < 2:
        return None
    fork = readers_of(tensor)
    return fork if fork.links and len(fork.links) + (fork.last is not None) >= 2 else None


def find_forks(gm: fx.GraphModule) -> list[Fork]:
    """Every fork of the graph."""
    return [fork for node in gm.graph.nodes if (fork := fork_at(node)) is not None]
