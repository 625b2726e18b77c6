"""Forks: one tensor with several readers, of which at least two are fused nodes that can pass it on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure.graph.ir import ConcatBuffer, Conv, Link, Residual, fused_of
from bnrestructure.graph.order import readers_of
from bnrestructure.graph.provenance import provenance

__all__ = ["Fork", "fork", "fork_at"]


@dataclass(frozen=True)
class Fork:
    """A tensor and its readers in graph order: ``links`` are fused nodes that read it as ``x`` and can pass it on, ``last`` is a fused
    node behind them that reads it and ends the chain (a residual's shortcut, a concat), ``others`` read it in place.
    """

    tensor: fx.Node
    links: list[fx.Node]
    last: fx.Node | None
    others: list[fx.Node]


def fork(node: fx.Node) -> Fork | None:
    """The fork at this node's tensor, where a chain through its readers would gain something."""
    if len(node.users) < 2 or node.op == "get_attr" or provenance(node).changed_by is not None:
        return None
    found = fork_at(node)
    return found if found.links and len(found.links) + (found.last is not None) >= 2 else None


def fork_at(tensor: fx.Node) -> Fork:
    """The readers of this tensor but the output, sorted by what a chain can do with them: a caller gets the tensor itself."""
    readers = [reader for reader in readers_of(tensor) if reader.op != "output"]
    links = [reader for reader in readers if _can_link(reader, tensor)]
    ends = [reader for reader in readers if reader not in links and _can_end(reader, tensor)]
    last = ends[-1] if ends and all(link < ends[-1] for link in links) else None
    return Fork(tensor, links, last, [reader for reader in readers if reader not in links and reader is not last])


def _can_link(reader: fx.Node, tensor: fx.Node) -> bool:
    view = fused_of(reader)
    if not isinstance(view, Link) or view.x is not tensor or view.times_read(tensor) != 1:
        return False
    forms_residual = isinstance(view, Conv) and view.forms_residual  # it would pass on the sum
    return not forms_residual and "passed" not in view.outs()


def _can_end(reader: fx.Node, tensor: fx.Node) -> bool:
    view = fused_of(reader)
    if isinstance(view, Residual):
        return view.r is tensor and view.y is not tensor and view.r_gain is None
    if isinstance(view, Conv):
        return view.into is tensor and view.x is not tensor
    return isinstance(view, ConcatBuffer) and tensor in (view.into, view.x)
