"""The plan of a model: the sites of its regions, those outside, and their shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

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
from bnrestructure.passes import pipeline
from bnrestructure.patterns.batch_norm import site_names
from bnrestructure.plan.kernels import Shapes, convolution_kernels, planned_device
from bnrestructure.plan.plan import Plan, Site
from bnrestructure.plan.sites import kept_site, sites_of

__all__ = ["layer_shapes", "make_plan", "region_graphs"]


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
            pipeline.rewrite(after, options.passes, options.backend, options.fuel)
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
        for site in sites_of(path, site_names(before.graph), after):
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
        yield kept_site(name, reason)


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
