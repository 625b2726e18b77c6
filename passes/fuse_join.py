"""fuse-join: a residual join + the CONV that reads its sum -> the convolution's prologue, and the dgrad's epilogue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from bnrestructure.graph.fused import outputs_of, set_kwargs
from bnrestructure.passes.base import Fuel, PassResult, erase_dead, finish
from bnrestructure.patterns.join import JoinedConv, find_joined_convs

__all__ = ["FuseJoin"]


@dataclass(frozen=True)
class FuseJoin:
    """``conv(act(normalise(y) + shortcut))`` -> one node.

    The sum is stored as it is formed, and of its gradient only what both operands share. The pass comes behind thread-forks: the first
    reader of a thread is the last to add to its gradient, so it can finish it.
    """

    name: ClassVar[str] = "fuse-join"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        count = 0
        for match in find_joined_convs(graph_module):
            if self.fuel.take():
                _fuse(graph_module.graph, match)
                count += 1
        return finish(graph_module, count)


def _fuse(graph: fx.Graph, match: JoinedConv) -> None:
    join, conv = match.join, match.conv
    of = join.kwargs
    set_kwargs(
        conv, x=of["y"], mean=of["mean"], scale=of["scale"], beta=of["beta"], act=of["act"], r=of["r"], r_mean=of["r_mean"],
        r_scale=of["r_scale"], r_beta=of["r_beta"], x_gain=of["gain"], r_gain=of["r_gain"],
    )  # fmt: skip
    conv.meta["bnr_normalises"] = [*conv.meta.get("bnr_normalises", []), *join.meta["bnr_normalises"]]
    erase_dead(graph, join, *outputs_of(join).values())
