"""Where a statistics node can ride: on the convolution or the residual join that produces its tensor, or on a concat's segments."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import is_fused, produced_by
from bnrestructure.graph.layers import ConvLayer, conv_of, modules_of
from bnrestructure.graph.operations import concat_of
from bnrestructure.patterns.base import Refusal

__all__ = ["ConcatStatistics", "ConvStatistics", "find_concat_statistics", "find_conv_statistics", "find_residual_statistics"]


@dataclass(frozen=True)
class ConvStatistics:
    """CONV -> statistics. ``layer`` is None when the convolution is a fused node already."""

    statistics: fx.Node
    conv: fx.Node
    layer: ConvLayer | None


@dataclass(frozen=True)
class ConcatStatistics:
    """concat -> statistics: the statistics of a concat are those of its segments."""

    statistics: fx.Node
    concat: fx.Node
    segments: list[fx.Node]


def _all(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_fused(n, ops.statistics)]


def find_conv_statistics(gm: fx.GraphModule) -> list[ConvStatistics | Refusal]:
    """Every statistics node: the convolution that it can ride on, or why there is none."""
    modules = modules_of(gm)
    found: list[ConvStatistics | Refusal] = []
    for node in _all(gm):
        source: fx.Node = node.kwargs["x"]  # type: ignore[assignment]
        fused = produced_by(source, ops.conv, "y")
        layer = conv_of(source, modules)
        if fused is not None:
            found.append(ConvStatistics(node, fused, None))
        elif isinstance(layer, ConvLayer):
            found.append(ConvStatistics(node, source, layer))
        elif isinstance(layer, str):
            found.append(Refusal(node, layer))
        else:
            found.append(Refusal(node, f"no convolution produces its input ({describe(source, modules)} does)"))
    return found


def find_concat_statistics(gm: fx.GraphModule) -> list[ConcatStatistics]:
    """Statistics of concats along channels."""
    found = []
    for node in _all(gm):
        source: fx.Node = node.kwargs["x"]  # type: ignore[assignment]
        segments = concat_of(source)
        if segments is not None and not any("bnr_shared" in s.meta for s in segments):  # changed in place before the concat
            found.append(ConcatStatistics(node, source, segments))
    return found


def find_residual_statistics(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """(statistics, residual join) where the statistics can ride in the join's epilogue."""
    pairs = []
    for node in _all(gm):
        join = produced_by(node.kwargs["x"], ops.residual, "out")
        if join is not None:
            pairs.append((node, join))
    return pairs


def describe(node: fx.Node, modules: Mapping[str, object]) -> str:
    """A few words for what a node is, for reasons."""
    if node.op == "placeholder":
        return "the region's input"
    if node.op == "call_module":
        return f"{type(modules.get(str(node.target))).__name__} {node.target}"
    if node.op == "get_attr":
        return f"the attribute {node.target}"
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and is_fused(source):
        node = source  # type: ignore[assignment]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name} {node.meta['bnr_module']}" if "bnr_module" in node.meta else str(name)
