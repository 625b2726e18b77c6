"""Which parts of a model run rewritten, and as what graphs: as a training forward would see it, or, once there was one, as it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from bnrestructure.capture.arguments import Arguments
from bnrestructure.capture.program import copied_graph
from bnrestructure.capture.regions import Options, captured, holding_batch_norms
from bnrestructure.capture.swap import original_class, region_of, training_flags
from bnrestructure.core import progress
from bnrestructure.core.errors import BrokenGraphError, CaptureError, NotFollowedError
from bnrestructure.graph.boundaries import boundary_reason, is_called, is_library_leaf
from bnrestructure.graph.layers import conv_of
from bnrestructure.graph.provenance import known_tensor, module_path, provenance
from bnrestructure.passes import pipeline
from bnrestructure.patterns.batch_norm import site_names
from bnrestructure.plan.shapes import Observed, Shapes

__all__ = ["Survey", "SurveyedRegion", "take_survey"]


@dataclass
class SurveyedRegion:
    """One part of a model that runs as a rewritten graph.

    sites    names of its batch norm calls, relative to ``path``
    after    its graph after the passes; ``before`` them, where it was captured for the survey
    given    whether it was captured with what it gets from example inputs: then the shapes that nodes know are theirs
    ran      whether a training forward has run it
    """

    path: str
    sites: list[str]
    after: fx.GraphModule
    before: fx.GraphModule | None = None
    given: bool = False
    ran: bool = False


@dataclass
class Survey:
    """The regions, outermost first, and why other modules' own forwards run.

    ran    whether there have been training forwards: then it tells of those
    """

    ran: bool
    regions: list[SurveyedRegion] = field(default_factory=list)
    reasons: dict[nn.Module, str] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)


def take_survey(model: nn.Module, options: Options, inputs: tuple[Any, ...] | None = None) -> Survey:
    """Survey a model. Each part is captured once, and parts that have run are not captured again.

    With ``inputs`` each part is captured with what it gets from them: what a part gets whose caller cannot be followed, the model's own
    forward tells.
    """
    regions = [region for module in model.modules() if (region := region_of(module)) is not None]
    survey = Survey(ran=any(region.ran.calls or region.refusals for region in regions))
    paths = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    with training_flags(model):
        _look(model, options, None if inputs is None else Observed(model, inputs), paths, holding_batch_norms(model), survey)
    survey.regions = _without_doubles(model, survey.regions)
    return survey


def _without_doubles(model: nn.Module, regions: list[SurveyedRegion]) -> list[SurveyedRegion]:
    """The regions but for those all of whose batch norms are another's, too: a module with two names, of which a forward calls one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    known: set[nn.Module | None] = set()
    kept = []
    for region in sorted(regions, key=lambda region: not region.ran):
        prefix = f"{region.path}." if region.path else ""
        layers = {modules.get(prefix + site.split("#")[0]) for site in region.sites}
        if None in layers or not layers <= known:
            kept.append(region)
        known |= layers
    return [region for region in regions if region in kept]


def _look(
    module: nn.Module, options: Options, observed: Observed | None, paths: dict[nn.Module, str], holding: set[nn.Module], survey: Survey
) -> None:
    if module not in holding or is_library_leaf(module):
        return
    children: Iterable[nn.Module] = module.children()
    region = region_of(module)
    ran = None if region is None else region.ran
    if not is_called(module):
        ran = None  # but its parts are
    elif ran is not None and ran.calls and ran.graph is not None:
        after = _with_modules_of(module, ran.graph)
        survey.regions.append(SurveyedRegion(paths[module], ran.sites, after, ran=True))
        called = {str(node.target) for node in after.graph.nodes if node.op == "call_module"}
        children = (m for name, m in module.named_modules() if name in called)
    elif ran is not None and ran.refusals:
        survey.reasons[module] = ran.refusals[-1]
        if ran.probation is not None and ran.probation.reason is not None:
            children = ()  # they run their own forwards with it
    elif not any(_has_run(m) for m in module.modules()):
        try:
            arguments = None if observed is None else observed.arguments(paths[module])
            children = _captured(module, options, arguments, paths[module], survey)
        except (CaptureError, BrokenGraphError) as error:
            if observed is not None and isinstance(error, NotFollowedError):
                observed.check()
            survey.reasons[module] = str(error)
    for child in children:
        _look(child, options, observed, paths, holding, survey)


def _has_run(module: nn.Module) -> bool:
    region = region_of(module)
    return region is not None and region.ran.calls > 0


def _captured(
    module: nn.Module, options: Options, arguments: Arguments | None, path: str, survey: Survey
) -> Iterable[nn.Module]:
    """Capture and rewrite one module; the submodules that stay calls."""
    if "forward" in module.__dict__:
        raise CaptureError("its forward is replaced on the instance")
    progress.expect(2)
    progress.tell(f"capturing {path or 'the whole model'}")
    found = captured(module, original_class(module).forward, arguments)
    gm = found.graph_module
    if arguments is not None:
        survey.shapes.update(_shapes(gm, path))
    before = _with_modules_of(gm, gm.graph)
    sites = site_names(gm.graph)
    progress.tell(f"rewriting {path or 'the whole model'}")
    pipeline.rewrite(gm, options.passes, options.backend, options.fuel)
    survey.regions.append(SurveyedRegion(path, sites, gm, before, given=arguments is not None))
    parts = dict(_called_parts(module, found.opaque))
    survey.reasons.update(parts)
    return parts


def _called_parts(module: nn.Module, opaque: dict[nn.Module, str]) -> Iterator[tuple[nn.Module, str]]:
    """The submodules that the graph of ``module`` calls as they are, and why. Layers of PyTorch's are not among them."""
    for child in module.children():
        if is_library_leaf(child):
            continue
        reason = (opaque.get(child) or boundary_reason(child)) if is_called(child) else None
        if reason is not None:
            yield child, reason
        else:
            yield from _called_parts(child, opaque)


def _with_modules_of(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A copy of the graph, beside all submodules of ``root``: also those that the graph calls no more."""
    gm = fx.GraphModule(root, copied_graph(graph), class_name=type(root).__name__)
    gm._modules.update(root._modules)
    return gm


def _shapes(gm: fx.GraphModule, path: str) -> Shapes:
    """Shape and dtype of the first input of each layer that the graph calls, and of each module that calls a function of one."""
    prefix = f"{path}." if path else ""
    found: Shapes = {}
    for node in gm.graph.nodes:
        source = node.args[0] if node.args else None
        known = known_tensor(source) if isinstance(source, fx.Node) else None
        layer = node.op == "call_module" or provenance(node).site is not None or conv_of(node) is not None
        if known is not None and layer:
            found.setdefault(prefix + module_path(node), (known.shape, known.dtype))
    return found
