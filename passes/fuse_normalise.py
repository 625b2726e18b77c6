"""fuse-normalise: normalise + activation + CONV -> the convolution's prologue; likewise into pools and squeeze-excite gates."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import output, set_kwargs
from bnrestructure.graph.layers import module_path
from bnrestructure.graph.operations import concat_of
from bnrestructure.passes.base import Fuel, PassResult, erase_dead, finish
from bnrestructure.passes.to_fused import to_fused_conv
from bnrestructure.patterns.normalise import (
    ConvReader,
    Excitation,
    find_activated,
    find_conv_readers,
    find_excitations,
)
from bnrestructure.patterns.normalised_concat import NormalisedConcat, find_normalised_concats
from bnrestructure.patterns.pool import PoolReader, find_pool_readers

__all__ = ["FuseNormalise"]

_VECTORS = ("mean", "scale", "beta")


@dataclass(frozen=True)
class FuseNormalise:
    """``conv(act(normalise(y)))`` -> ``conv(y, mean, scale, beta, act)``: the normalised tensor never reaches memory.

    First activations join their normalise, and a concat of normalised tensors becomes the normalise of a concat. Then every reader that
    can apply the normalise itself does: convolutions, pools, global averages, gated convolutions behind squeeze-excite. On
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
        # One at a time: the concat that a rewrite replaces may be a segment of the next.
        while (concat := next(find_normalised_concats(graph_module), None)) is not None and self.fuel.take():
            _normalise_after_concat(graph, concat)
            count += 1
        for excitation in find_excitations(graph_module):
            if self.fuel.take():
                _excite(graph, excitation)
                count += 1
        for reader in find_conv_readers(graph_module):
            if self.fuel.take():
                _into_conv(graph, reader)
                count += 1
        for pool in find_pool_readers(graph_module):
            if self.fuel.take():
                _into_pool(graph, pool)
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


def _into_pool(graph: fx.Graph, reader: PoolReader) -> None:
    normalise, pool = reader.normalise, reader.pool
    arguments = {k: normalise.kwargs[k] for k in ("x", *_VECTORS, "act")}
    if reader.kind == "global average":
        with graph.inserting_before(pool):
            fused = graph.call_function(ops.squeeze, (), {**arguments, "excite": False})
        pooled = output(fused, "pooled")
        result = _spread(graph, pooled, pool) if reader.keepdim else pooled
    else:
        function = ops.max_pool if reader.kind == "max" else ops.avg_pool
        window = {k: v for k, v in reader.window.items() if k != "input"}
        with graph.inserting_before(pool):
            fused = graph.call_function(function, (), {**arguments, **window, "thread": False})
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


def _normalise_after_concat(graph: fx.Graph, match: NormalisedConcat) -> None:
    with graph.inserting_before(match.concat):
        vectors = [_vectors_of(graph, tensor, normalise) for tensor, normalise in match.segments]
        raw = graph.call_function(
            torch.cat, ([tensor if normalise is None else normalise.kwargs["x"] for tensor, normalise in match.segments], 1)
        )
        joined = {name: _vector(graph, torch.cat, [of[name] for of in vectors]) for name in _VECTORS}
        arguments: dict[str, Any] = {"x": raw, **joined, "act": match.act, "thread": False}
        normalise = graph.call_function(ops.normalise, (), arguments)
    raw.meta["nn_module_stack"] = normalise.meta["nn_module_stack"] = match.concat.meta.get("nn_module_stack", {})
    sources = [source for _, source in match.segments if source is not None]
    normalise.meta["bnr_normalises"] = [site for source in sources for site in source.meta["bnr_normalises"]]
    inner = [n for n in match.concat.all_input_nodes if concat_of(n) is not None]
    match.concat.replace_all_uses_with(output(normalise, "z"))
    graph.erase_node(match.concat)
    _erase_concats(graph, inner)
    for source in sources:
        _drop(graph, source)


def _vectors_of(graph: fx.Graph, tensor: fx.Node, normalise: fx.Node | None) -> dict[str, Any]:
    """mean, scale and beta of a segment: its normalise's, or those that change nothing."""
    if normalise is not None:
        return {name: normalise.kwargs[name] for name in _VECTORS}
    made = _vector(graph, ops.unchanged, tensor)
    return {name: _vector(graph, operator.getitem, made, i) for i, name in enumerate(_VECTORS)}


def _vector(graph: fx.Graph, function: Callable[..., Any], *arguments: Any) -> fx.Node:
    node = graph.call_function(function, arguments)
    node.meta["bnr_vector"] = True
    return node


def _erase_concats(graph: fx.Graph, concats: list[fx.Node]) -> None:
    """Erase what is left of concats that were segments of a concat, and those inside them."""
    for concat in concats:
        if not concat.users:
            inner = [n for n in concat.all_input_nodes if concat_of(n) is not None]
            graph.erase_node(concat)
            _erase_concats(graph, inner)
