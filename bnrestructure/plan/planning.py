"""Reading a plan off rewritten graphs: where each half of each batch norm ended up, and why not on a neighbour."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bnrestructure import ops
from bnrestructure.capture.regions import Options
from bnrestructure.capture.swap import original_class, region_of, swap_out
from bnrestructure.core.errors import first_line
from bnrestructure.graph.fused import is_fused, outputs_of, tensor_readers
from bnrestructure.graph.layers import modules_of
from bnrestructure.patterns.base import Refusal
from bnrestructure.patterns.batch_norm import find_batch_norms
from bnrestructure.patterns.statistics import describe, find_conv_statistics
from bnrestructure.plan.kernels import convolution_kernels, planned_device
from bnrestructure.plan.plan import Plan, Site
from bnrestructure.plan.survey import Shapes, Survey, SurveyedRegion, take_survey

__all__ = ["layer_shapes", "make_plan"]

# Sweeps over the normalised tensor in one training step, beyond the convolutions' own reads and writes. Before: BN reads twice and writes
# (3), its backward reads gradient and input twice and writes (5); an activation out of place adds 2 and 3.
_BEFORE_BATCH_NORM, _BEFORE_ACTIVATION = 8, 5
# After: an epilogue costs nothing forward and one read of y in backward; a prologue one read of x in the dgrad epilogue; sweeps of their
# own read and write (statistics 1 + 3, normalise 2 + 3).
_AFTER_STATISTICS = {"epilogue": 1, "shared": 0, "sweep": 4}
_AFTER_NORMALISE = {"prologue": 1, "sweep": 5}

_LONELY = "neither half has a neighbour to ride on: no convolution before it, and none (nor a pool or a residual join) after it"


def make_plan(model: nn.Module, options: Options, inputs: tuple[Any, ...] | None = None, survey: Survey | None = None) -> Plan:
    """The plan of restructuring ``model`` with these options; after training forwards, what ran. Changes nothing.

    With example inputs shapes and bytes are known too, and what each fused convolution will run. A ``survey`` that was taken already
    is used. Raises UsageError for inputs that the model does not take.
    """
    survey = take_survey(model, options, inputs) if survey is None else survey
    plan = Plan(original_class(model).__name__)
    device, notes = planned_device(model, options.backend, inputs or ())
    shapes = survey.shapes
    if inputs is not None and not _all_shapes_known(model, shapes):
        shapes, missing = layer_shapes(model, inputs)
        plan.notes += [] if missing is None else [missing]
    plan.notes += notes
    seen: set[str] = set()
    for region in survey.regions:
        plan.regions.append(region.path or "the whole model")
        for site in _sites(region):
            site.ran = region.ran if survey.ran else None
            seen.add(site.name.split("#")[0])
            plan.sites.append(site)
        if device is not None:
            plan.kernels += convolution_kernels(region.path, region.after, shapes, options.backend, device)
    plan.sites += _kept_outside(model, seen, survey)
    for site in plan.sites:
        _add_bytes(site, shapes.get(site.name.split("#")[0]))
    for name, module in model.named_modules():
        region_here = region_of(module)
        if region_here is not None:
            plan.notes += [f"{name or 'the model'}: ran as it was: {reason}" for reason in region_here.ran.refusals]
            if region_here.ran.captures:
                plan.captures[name or "the whole model"] = region_here.ran.captures
    return plan


def _all_shapes_known(model: nn.Module, shapes: Shapes) -> bool:
    return all(name in shapes for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def _kept_outside(model: nn.Module, seen: set[str], survey: Survey) -> Iterator[Site]:
    """Batch norm layers that no region's graph calls."""
    paths = dict(model.named_modules())
    inside_of = {paths["" if region.path == "" else region.path] for region in survey.regions}
    for name, module in paths.items():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or name in seen:
            continue
        reason = "nothing in the captured training graph calls it"
        parents = [name.rsplit(".", i)[0] if i else name for i in range(name.count(".") + 1)] + [""]
        inside = any(paths.get(p) in inside_of for p in parents if p != name)
        blamed = next((paths[p] for p in parents if paths.get(p) in survey.reasons), None)
        if blamed is not None and not (inside and blamed is model):
            reason = survey.reasons[blamed]
        yield Site(
            name, "bn", "kept", reason, sweeps_before=_BEFORE_BATCH_NORM, sweeps_after=_BEFORE_BATCH_NORM, ran=False if survey.ran else None
        )


def _sites(region: SurveyedRegion) -> Iterator[Site]:
    after = region.after
    prefix = f"{region.path}." if region.path else ""
    statistics = _carriers(after, "bnr_statistics_of")
    normalises = _carriers(after, "bnr_normalises")
    left = {n.meta["bnr_site"]: n for n in after.graph.nodes if "bnr_site" in n.meta and n.target is not ops.finalize}
    left |= {site: n for n in after.graph.nodes for site in n.meta.get("bnr_kept", [])}
    refusals = {r.node.meta["bnr_site"]: r.reason for r in find_batch_norms(after) if isinstance(r, Refusal)}
    refusals |= {site: _LONELY for n in left.values() for site in n.meta.get("bnr_kept", [])}
    refused_statistics = {r.node: r.reason for r in find_conv_statistics(after) if isinstance(r, Refusal)}
    swept: set[fx.Node] = set()
    for name in region.sites:
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

    layers = (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd)
    names = {name for name, module in model.named_modules() if isinstance(module, layers[0])}
    try:
        double = copy.deepcopy(model).to("meta").train()
        swap_out(double)
        for name, module in double.named_modules():
            if isinstance(module, layers[0]) and module.momentum is None:
                module.momentum = 0.1  # a cumulative average reads a counter's value, which a meta tensor has not
            if isinstance(module, layers):
                module.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]) if args else None)
        double(*pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:  # it reads values, or cannot be there
        # Meta tensors have no values. Shapes found so far still serve the plan, which then says how far they go.
        return found, f"shapes are known for {len(names & found.keys())} batch norms only: {first_line(error)}"
    return found, None
