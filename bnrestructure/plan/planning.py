"""Reading a plan off rewritten graphs: where each half of each batch norm ended up, and why not on a neighbour."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bnrestructure import ops
from bnrestructure.capture.regions import Options, captured
from bnrestructure.capture.swap import (
    find_regions,
    is_restructured,
    original_class,
    region_of,
    swap_out,
    training_flags,
)
from bnrestructure.capture.tracer import Arguments
from bnrestructure.core import progress
from bnrestructure.core.errors import first_line
from bnrestructure.graph.fused import is_fused, outputs_of, tensor_readers
from bnrestructure.graph.layers import modules_of
from bnrestructure.passes import pipeline
from bnrestructure.patterns.base import Refusal
from bnrestructure.patterns.batch_norm import find_batch_norms
from bnrestructure.patterns.statistics import describe, find_conv_statistics
from bnrestructure.plan.kernels import Shapes, convolution_kernels, planned_device
from bnrestructure.plan.plan import Plan, Site

__all__ = ["layer_shapes", "make_plan", "region_graphs"]

# Sweeps over the normalised tensor in one training step, beyond the convolutions' own reads and writes. Before: BN reads twice and writes
# (3), its backward reads gradient and input twice and writes (5); an activation out of place adds 2 and 3.
_BEFORE_BATCH_NORM, _BEFORE_ACTIVATION = 8, 5
# After: an epilogue costs nothing forward and one read of y in backward; a prologue one read of x in the dgrad epilogue; sweeps of their
# own read and write (statistics 1 + 3, normalise 2 + 3).
_AFTER_STATISTICS = {"epilogue": 1, "shared": 0, "sweep": 4}
_AFTER_NORMALISE = {"prologue": 1, "sweep": 5}

_LONELY = "neither half has a neighbour to ride on: no convolution before it, and none (nor a pool or a residual join) after it"


def region_graphs(model: nn.Module, options: Options) -> Iterator[tuple[str, fx.GraphModule, fx.GraphModule]]:
    """(path, captured graph, rewritten graph) of every region, as a training forward with plain tensor arguments would see it."""
    paths = {module: name for name, module in model.named_modules()}
    with training_flags(model):
        regions = list(find_regions(model)[0])
        progress.expect(2 * len(regions))
        for region in regions:
            name = paths[region] or "the whole model"
            forward = original_class(region).forward
            progress.tell(f"capturing {name}")
            before, _ = captured(region, forward, Arguments.assumed(forward))
            after, _ = captured(region, forward, Arguments.assumed(forward))
            progress.tell(f"rewriting {name}")
            pipeline.run(after, options.passes, options.backend, options.fuel)
            yield paths[region], before, after


def make_plan(model: nn.Module, options: Options, inputs: tuple[Any, ...] | None = None) -> Plan:
    """The plan of restructuring ``model`` with these options. Changes nothing.

    With example inputs shapes and bytes are known too, and what each fused convolution will run.
    """
    plan = Plan(original_class(model).__name__)
    seen: set[str] = set()
    shapes, missing = ({}, None) if inputs is None else layer_shapes(model, inputs)
    if missing is not None:
        plan.notes.append(missing)
    device, notes = planned_device(model, options.backend, inputs or ())
    plan.notes += notes
    for path, before, after in region_graphs(model, options):
        plan.regions.append(path or "the whole model")
        for site in _sites(path, before, after):
            seen.add(site.name.split("#")[0])
            plan.sites.append(site)
        if device is not None:
            plan.kernels += convolution_kernels(path, after, shapes, options.backend, device)
    plan.sites += _kept_outside(model, seen)
    for site in plan.sites:
        _add_bytes(site, shapes.get(site.name.split("#")[0]))
    for name, module in model.named_modules():
        if is_restructured(module):
            plan.notes += [f"{name or 'the model'}: ran as it was: {reason}" for reason in region_of(module).refusals]
    return plan


def _kept_outside(model: nn.Module, seen: set[str]) -> Iterator[Site]:
    """Batch norm layers that no region's graph calls."""
    with training_flags(model):
        regions, reasons = find_regions(model)
    paths = dict(model.named_modules())
    for name, module in paths.items():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or name in seen:
            continue
        reason = "nothing in the captured training graph calls it"
        parents = [name.rsplit(".", i)[0] if i else name for i in range(name.count(".") + 1)] + [""]
        inside = any(paths.get(p) in regions for p in parents if p != name)
        blamed = next((paths[p] for p in parents if paths.get(p) in reasons), None)
        if blamed is not None and not (inside and blamed is model):
            reason = reasons[blamed]
        yield Site(name, "bn", "kept", reason, sweeps_before=_BEFORE_BATCH_NORM, sweeps_after=_BEFORE_BATCH_NORM)


def _sites(path: str, before: fx.GraphModule, after: fx.GraphModule) -> Iterator[Site]:
    prefix = f"{path}." if path else ""
    statistics = _carriers(after, "bnr_statistics_of")
    normalises = _carriers(after, "bnr_normalises")
    left = {n.meta["bnr_site"]: n for n in after.graph.nodes if "bnr_site" in n.meta and n.target is not ops.finalize}
    left |= {site: n for n in after.graph.nodes for site in n.meta.get("bnr_kept", [])}
    refusals = {r.node.meta["bnr_site"]: r.reason for r in find_batch_norms(after) if isinstance(r, Refusal)}
    refusals |= {site: _LONELY for n in left.values() for site in n.meta.get("bnr_kept", [])}
    refused_statistics = {r.node: r.reason for r in find_conv_statistics(after) if isinstance(r, Refusal)}
    swept: set[fx.Node] = set()
    for match in find_batch_norms(before):
        name = match.node.meta["bnr_site"]
        if name in left:
            reason = refusals.get(name, "the passes that were asked for leave it")
            yield Site(prefix + name, "bn", "kept", reason, sweeps_before=_BEFORE_BATCH_NORM, sweeps_after=_BEFORE_BATCH_NORM)
        else:
            yield _site(prefix + name, statistics.get(name, []), normalises.get(name, []), refused_statistics, swept, after)


def _carriers(gm: fx.GraphModule, key: str) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for site in node.meta.get(key, []) if is_fused(node) else []:
            found.setdefault(site, []).append(node)
    return found


def _site(
    name: str,
    statistics: list[fx.Node],
    normalises: list[fx.Node],
    refused: dict[fx.Node, str],
    swept: set[fx.Node],
    gm: fx.GraphModule,
) -> Site:
    modules = modules_of(gm)
    reasons = []
    own_sweeps = [n for n in statistics if n.target is ops.statistics and n not in swept]
    swept.update(own_sweeps)
    for node in own_sweeps:
        reasons.append(f"its statistics take a sweep: {refused.get(node, 'fuse-statistics was not run')}")
    shared = len(statistics) > 1 or any(n.meta.get("bnr_shared_statistics") for n in statistics)
    where = "sweep" if own_sweeps else "shared" if shared else "epilogue"
    act = str(normalises[0].kwargs["act"]) if normalises else "identity"
    alone = [n for n in normalises if n.target is ops.normalise]
    for node in alone:
        readers = sorted({describe(u, modules) for u in tensor_readers(outputs_of(node)["z"])}) if "z" in outputs_of(node) else []
        reasons.append(f"its normalised tensor is kept in memory for {', '.join(readers) or 'nobody'}")
    rides_statistics, rides_normalise = not own_sweeps, not alone and bool(normalises)
    status = "fused" if rides_statistics and rides_normalise else "partial" if rides_statistics or rides_normalise else "kept"
    before = _BEFORE_BATCH_NORM + (0 if act == "identity" else _BEFORE_ACTIVATION)
    after = _AFTER_STATISTICS[where] + _AFTER_NORMALISE["sweep" if alone else "prologue"]
    return Site(
        name=name,
        pattern=_pattern(statistics, shared, act, normalises),
        status=status,
        reason="; ".join(reasons) or None,
        statistics=", ".join(sorted({_label(n) for n in statistics})[:3]) or None,
        normalise=", ".join(_label(n) for n in normalises[:3]) or None,
        sweeps_before=before,
        sweeps_after=min(after, before),
    )


def _label(node: fx.Node) -> str:
    return str(node.meta.get("bnr_module", node.name))


def _pattern(statistics: list[fx.Node], shared: bool, act: str, normalises: list[fx.Node]) -> str:
    kinds = {n.target for n in statistics}
    start = "concat" if shared and len(statistics) > 1 else "conv" if kinds == {ops.conv} else "add" if ops.residual in kinds else "any"
    ends = []
    for node in normalises:
        if node.target is ops.residual or node.kwargs.get("r") is not None:
            own = node.kwargs["act"]
            end = "add" if own == "identity" else f"add-{str(own).split('(')[0]}"
        elif node.target is ops.conv:
            layer = node.meta.get("bnr_conv")
            end = "depthwise" if layer is not None and layer.depthwise else "conv"
            end = f"squeeze-excite-{end}" if node.kwargs["gate"] is not None else end
        else:
            others: dict[Any, str] = {
                ops.max_pool: "max_pool", ops.avg_pool: "avg_pool", ops.squeeze: "avg_pool", ops.normalise: "other",
            }  # fmt: skip
            end = others[node.target]
        if end not in ends:
            ends.append(end)
    middle = [] if act == "identity" or "add" in (e.split("-")[0] for e in ends) else [act.split("(")[0]]
    return "-".join([start, "bn", *middle, "|".join(ends) or "other"])


def _add_bytes(site: Site, known: tuple[torch.Size, torch.dtype] | None) -> None:
    if known is None:
        return
    shape, dtype = known
    size = shape.numel() * dtype.itemsize
    site.shape, site.dtype = tuple(shape), str(dtype).removeprefix("torch.")
    site.bytes_before, site.bytes_after = site.sweeps_before * size, site.sweeps_after * size


def layer_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Shapes, str | None]:
    """Input shape and dtype of every batch norm and convolution layer in one training forward, from the meta device.

    The second result says why some are missing, or is None: data-dependent models cannot run there to the end.
    """
    found: Shapes = {}

    def record(name: str, x: torch.Tensor) -> None:
        found.setdefault(name, (x.shape, x.dtype))

    double = copy.deepcopy(model).to("meta").train()
    swap_out(double)
    layers = (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd)
    for name, module in double.named_modules():
        if isinstance(module, layers[0]) and module.momentum is None:
            module.momentum = 0.1  # a cumulative average reads a counter's value, which a meta tensor has not
        if isinstance(module, layers):
            module.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]) if args else None)
    try:
        double(*pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:  # it reads values, or refuses the shape
        # Meta tensors have no values. Shapes found so far still serve the plan, which then says how far they go.
        names = {name for name, module in double.named_modules() if isinstance(module, layers[0])}
        return found, f"shapes are known for {len(names & found.keys())} batch norms only: {first_line(error)}"
    return found, None
