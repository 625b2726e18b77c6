"""fuse-normalise: normalise + activation + CONV -> the convolution's prologue; likewise into pools and squeeze-excite gates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import output, set_kwargs
from bnrestructure.graph.layers import module_path
from bnrestructure.graph.operations import GlobalAverage
from bnrestructure.passes.base import Fuel, PassResult, erase_dead, finish
from bnrestructure.passes.to_fused import to_fused_conv
from bnrestructure.patterns.normalise import (
    ConcatOfNormalised,
    ConvReader,
    Excitation,
    find_activated,
    find_concats_of_normalised,
    find_conv_readers,
    find_excitations,
    find_pool_readers,
)

__all__ = ["FuseNormalise"]

_VECTORS = ("mean", "scale", "beta")


@dataclass(frozen=True)
class FuseNormalise:
    """``conv(act(normalise(y)))`` -> ``conv(y, mean, scale, beta, act)``: the normalised tensor never reaches memory.

    First activations join their normalise, and a concat of normalised tensors becomes the normalise of a concat. Then every reader that
    can apply the normalise itself does: convolutions, max pools, global averages, gated convolutions behind squeeze-excite. On
    a graph without fission it is the paper's RCF: bare activations move into the convolutions that read them.
    """

    name: ClassVar[str] = "fuse-normalise"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        graph, count = graph_module.graph, 0
        for normalise, activation, act in find_activated(graph_module):
            if self.fuel.take():
                set_kwargs(normalise, act=act)
                activation.replace_all_uses_with(activation.all_input_nodes[0])
                graph.erase_node(activation)
                count += 1
        for join in find_concats_of_normalised(graph_module):
            if self.fuel.take():
                _normalise_after_concat(graph, join)
                count += 1
        for excitation in find_excitations(graph_module):
            if self.fuel.take():
                _excite(graph, excitation)
                count += 1
        for reader in find_conv_readers(graph_module):
            if self.fuel.take():
                _into_conv(graph, reader)
                count += 1
        for normalise, pool, window in find_pool_readers(graph_module):
            if self.fuel.take():
                _into_pool(graph, normalise, pool, window)
                count += 1
        return finish(graph_module, count)


def _carry(fused: fx.Node, normalise: fx.Node) -> None:
    """Record on ``fused`` which sites' normalise it now applies."""
    sites = fused.meta.get("bnr_normalises", [])
    fused.meta["bnr_normalises"] = [*sites, *normalise.meta["bnr_normalises"]]


def _drop(graph: fx.Graph, normalise: fx.Node) -> None:
    """Erase a normalise node once nothing reads its result."""
    items = list(normalise.users)
    if all(not item.users for item in items):
        erase_dead(graph, normalise, *items)


def _into_conv(graph: fx.Graph, reader: ConvReader) -> None:
    conv = reader.conv if reader.layer is None else to_fused_conv(graph, reader.conv, reader.layer)
    if reader.normalise is not None:
        vectors = {k: reader.normalise.kwargs[k] for k in _VECTORS}
        set_kwargs(conv, x=reader.normalise.kwargs["x"], act=reader.act, **vectors)
        _carry(conv, reader.normalise)
        _drop(graph, reader.normalise)
    else:
        assert reader.activation is not None
        set_kwargs(conv, x=reader.activation.all_input_nodes[0], act=reader.act)
        erase_dead(graph, reader.activation)


def _into_pool(graph: fx.Graph, normalise: fx.Node, pool: fx.Node, window: dict[str, Any] | GlobalAverage) -> None:
    arguments = {k: normalise.kwargs[k] for k in ("x", *_VECTORS, "act")}
    if isinstance(window, GlobalAverage):
        with graph.inserting_before(pool):
            fused = graph.call_function(ops.squeeze, (), {**arguments, "excite": False})
        pooled = output(fused, "pooled")
        result = _spread(graph, pooled, pool) if window.keepdim else pooled
    else:
        window = {k: v for k, v in window.items() if k != "input"}
        with graph.inserting_before(pool):
            fused = graph.call_function(ops.max_pool, (), {**arguments, **window, "thread": False})
        result = output(fused, "z")
    fused.meta["bnr_module"] = module_path(pool)
    fused.meta["nn_module_stack"] = pool.meta.get("nn_module_stack", {})
    pool.replace_all_uses_with(result)
    graph.erase_node(pool)
    _carry(fused, normalise)
    _drop(graph, normalise)


def _spread(graph: fx.Graph, pooled: fx.Node, before: fx.Node) -> fx.Node:
    """[N, C] -> [N, C, 1, 1]."""
    with graph.inserting_before(before):
        return graph.call_method("unflatten", (pooled, 1, (-1, 1, 1)))


def _excite(graph: fx.Graph, match: Excitation) -> None:
    arguments = {k: match.normalise.kwargs[k] for k in ("x", *_VECTORS, "act")}
    with graph.inserting_before(match.average):
        squeeze = graph.call_function(ops.squeeze, (), {**arguments, "excite": True})
    squeeze.meta["bnr_module"] = module_path(match.average)
    squeeze.meta["nn_module_stack"] = match.average.meta.get("nn_module_stack", {})
    match.average.replace_all_uses_with(_spread(graph, output(squeeze, "pooled"), match.average))
    graph.erase_node(match.average)
    deferred = output(squeeze, "x")
    for node, layer in match.convs:
        with graph.inserting_before(node):
            gate = graph.call_method("flatten", (match.gate, 1))
        conv = node if layer is None else to_fused_conv(graph, node, layer)
        vectors = {k: arguments[k] for k in (*_VECTORS, "act")}
        set_kwargs(conv, x=deferred, gate=gate, **vectors)
        _carry(conv, match.normalise)
    erase_dead(graph, match.product)
    _drop(graph, match.normalise)


def _normalise_after_concat(graph: fx.Graph, match: ConcatOfNormalised) -> None:
    def joined(name: str) -> fx.Node:
        node = graph.call_function(torch.cat, ([n.kwargs[name] for n in match.normalised],))
        node.meta["bnr_vector"] = True
        return node

    with graph.inserting_before(match.concat):
        raw = graph.call_function(torch.cat, ([n.kwargs["x"] for n in match.normalised], 1))
        vectors = {name: joined(name) for name in _VECTORS}
        arguments: dict[str, Any] = {"x": raw, **vectors, "act": match.act, "thread": False}
        normalise = graph.call_function(ops.normalise, (), arguments)
    raw.meta["nn_module_stack"] = normalise.meta["nn_module_stack"] = match.concat.meta.get("nn_module_stack", {})
    normalise.meta["bnr_normalises"] = [site for n in match.normalised for site in n.meta["bnr_normalises"]]
    match.concat.replace_all_uses_with(output(normalise, "z"))
    graph.erase_node(match.concat)
    for old in match.normalised:
        _drop(graph, old)


