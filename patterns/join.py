"""join-conv: a residual join whose sum a convolution reads before anybody else, so that it can form the sum and finish its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import is_fused, outputs_of

__all__ = ["JoinedConv", "find_joined_convs"]


@dataclass(frozen=True)
class JoinedConv:
    """``conv(out)`` with ``out = residual(y, r)``; ``out`` has no other reader that does not have it from this convolution's thread."""

    join: fx.Node
    conv: fx.Node


def find_joined_convs(gm: fx.GraphModule) -> list[JoinedConv]:
    """Joins whose sum goes to one fused convolution as it is, and on through that convolution's thread if it is needed elsewhere.

    Not where statistics of the sum are taken: the convolution then reads it normalised.
    """
    found = []
    for join in gm.graph.nodes:
        if not is_fused(join, ops.residual) or join.kwargs["y"] is join.kwargs["r"]:
            continue
        results = outputs_of(join)
        readers = list(results["out"].users) if results.keys() == {"out"} else []
        if len(readers) == 1 and _reads_as_it_is(readers[0], results["out"]):
            found.append(JoinedConv(join, readers[0]))
    return found


def _reads_as_it_is(reader: fx.Node, tensor: fx.Node) -> bool:
    if not is_fused(reader, ops.conv) or reader.kwargs["x"] is not tensor or reader.kwargs.get("r") is not None:
        return False
    of = reader.kwargs
    once = sum(value is tensor for value in of.values()) == 1  # a buffer to write into, or even the weight, may be the same tensor
    return once and of["mean"] is None and of["gate"] is None and str(of["act"]) == "identity"
