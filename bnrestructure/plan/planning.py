"""The plan of a model: the sites of its regions, those outside, and their shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bnrestructure.capture.regions import Options
from bnrestructure.capture.swap import original_class, region_of
from bnrestructure.plan.kernels import convolution_kernels, planned_device
from bnrestructure.plan.plan import Plan, Site
from bnrestructure.plan.shapes import Shapes, layer_shapes
from bnrestructure.plan.sites import kept_site, sites_of
from bnrestructure.plan.survey import Survey, take_survey

__all__ = ["make_plan"]

#: Modules that a note names.
_NAMED = 4


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
        for site in sites_of(region.path, region.sites, region.after):
            site.ran = region.ran if survey.ran else None
            seen.add(site.name.split("#")[0])
            plan.sites.append(site)
        if device is not None:
            plan.kernels += convolution_kernels(region.path, region.after, shapes, options.backend, device)
    plan.sites += _kept_outside(model, seen, survey)
    for site in plan.sites:
        _add_bytes(site, shapes.get(site.name.split("#")[0]))
    called: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        region_here = region_of(module)
        refusals = [] if region_here is None else region_here.refusals
        plan.notes += [f"{name or 'the model'}: ran as it was: {reason}" for reason in refusals]
        probation = None if region_here is None else region_here.ran.probation
        if probation is not None:
            plan.notes += [] if refusals else [f"{name or 'the model'}: {probation}"]
            faults = {f"kernels for {kind} are left alone: {fault}": None for kind, fault in probation.kernels.faults().items()}
            plan.notes += [note for note in faults if note not in plan.notes]
        if region_here is not None and region_here.ran.replays is not None and not refusals:
            plan.notes.append(f"{name or 'the model'}: {region_here.ran.replays}")
        if module in survey.reasons and not refusals:
            called[survey.reasons[module]].append(name or "the model")
        if region_here is not None and region_here.ran.captures:
            plan.captures[name or "the whole model"] = region_here.ran.captures
    for reason, names in called.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        plan.notes.append(f"{', '.join(names[:_NAMED])}{more}: called as {'they are' if len(names) > 1 else 'it is'}: {reason}")
    return plan


def _all_shapes_known(model: nn.Module, shapes: Shapes) -> bool:
    return all(name in shapes for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def _kept_outside(model: nn.Module, seen: set[str], survey: Survey) -> Iterator[Site]:
    """Batch norm layers that no region's graph calls."""
    paths = dict(model.named_modules())
    called = {module for name, module in model.named_modules(remove_duplicate=False) if name in seen}
    inside_of = {paths[region.path] for region in survey.regions}
    for name, module in paths.items():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module in called:
            continue
        reason = "nothing in the captured training graph calls it"
        parents = [name.rsplit(".", i)[0] if i else name for i in range(name.count(".") + 1)] + [""]
        inside = any(paths.get(p) in inside_of for p in parents if p != name)
        blamed = next((paths[p] for p in parents if paths.get(p) in survey.reasons), None)
        if blamed is not None and not (inside and blamed is model):
            reason = survey.reasons[blamed]
        yield kept_site(name, reason, ran=False if survey.ran else None)


def _add_bytes(site: Site, known: tuple[torch.Size, torch.dtype] | None) -> None:
    if known is None:
        return
    shape, dtype = known
    size = shape.numel() * dtype.itemsize
    site.shape, site.dtype = tuple(shape), str(dtype).removeprefix("torch.")
    site.bytes_before, site.bytes_after = site.sweeps_before * size, site.sweeps_after * size
