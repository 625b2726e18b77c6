"""fuse-statistics: CONV + statistics -> the convolution's epilogue (MVF: one sweep, and that one not over memory)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import output, outputs_of, produced_by, set_kwargs
from bnrestructure.passes.base import Fuel, PassResult, finish
from bnrestructure.passes.to_fused import to_fused_conv
from bnrestructure.patterns.statistics import ConvStatistics, find_conv_statistics, find_residual_statistics

__all__ = ["FuseStatistics"]


@dataclass(frozen=True)
class FuseStatistics:
    """``y = conv(x); mean, var = statistics(y)`` -> ``y, mean, var = conv(x, statistics=True)``; a residual join likewise."""

    name: ClassVar[str] = "fuse-statistics"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        graph, count = graph_module.graph, 0
        for match in find_conv_statistics(graph_module):
            if isinstance(match, ConvStatistics) and self.fuel.take():
                conv = produced_by(match.statistics.kwargs["x"], ops.conv, "y")  # fused by now if it has other statistics, too
                if conv is None:
                    assert match.layer is not None
                    conv = to_fused_conv(graph, match.conv, match.layer)
                carry_statistics(graph, match.statistics, conv)
                count += 1
        for statistics, join in find_residual_statistics(graph_module):
            if self.fuel.take():
                carry_statistics(graph, statistics, join)
                count += 1
        return finish(graph_module, count)


def carry_statistics(graph: fx.Graph, statistics: fx.Node, producer: fx.Node) -> None:
    """Let ``producer`` (a fused conv or residual) compute what ``statistics`` computes of its output."""
    set_kwargs(producer, statistics=True)
    for name, item in outputs_of(statistics).items():
        replacement = statistics.kwargs["x"] if name == "x" else output(producer, name)
        item.replace_all_uses_with(replacement)  # type: ignore[arg-type]
        graph.erase_node(item)
    sites = producer.meta.get("bnr_statistics_of", [])
    producer.meta["bnr_statistics_of"] = [*sites, *statistics.meta["bnr_statistics_of"]]
    graph.erase_node(statistics)


