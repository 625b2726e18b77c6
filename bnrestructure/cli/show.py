"""``bnrestructure show MODEL``: the graph of a training step, as text, dot, svg, html or json."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnrestructure.cli.options import add_input_arguments, add_model_arguments, pass_names

if TYPE_CHECKING:
    from torch import nn

    from bnrestructure.capture.regions import Options
    from bnrestructure.plan.plan import Plan
    from bnrestructure.report.graph_view import RegionView

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments. Must not import torch."""
    add_model_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--before", action="store_true", help="the graph as captured, before any pass")
    which.add_argument(
        "--after", metavar="PASS", help="the graph after the pipeline up to this pass, or after a rung of the ladder"
    )
    parser.add_argument("--check", action="store_true", help="verify the graph after each pass, and list the rules that do not hold")
    parser.add_argument("--backward", action="store_true", help="what each node's backward does, in backward order")
    parser.add_argument(
        "--format",
        choices=("text", "dot", "svg", "html", "json"),
        default="text",
        help="html is one page with the graph before and after, for inputs of --batch and --input-size (default: %(default)s)",
    )
    add_input_arguments(parser, batch=16)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to FILE instead of standard output")


def run(arguments: argparse.Namespace) -> int:
    """Print or write the graph: exit status 0. With --check verify it: 0 if every rule holds, 1 if one does not."""
    from bnrestructure.cli.output import progress, stdout
    from bnrestructure.core.errors import UsageError
    from bnrestructure.core.progress import listening
    from bnrestructure.models.models import load_model

    form = "json" if arguments.json else arguments.format
    if arguments.json and arguments.format not in ("text", "json"):
        raise UsageError(f"--json and --format {arguments.format} ask for two things")
    if arguments.check and (form not in ("text", "json") or (form == "text" and arguments.output is not None)):
        raise UsageError("--check prints a table; with --format json, JSON, which --output writes to a file")
    if form == "html" and (arguments.before or arguments.backward):
        raise UsageError("--format html shows both graphs, and what each box does in backward: without --before and --backward")
    with progress(arguments.model) as say:
        say("building the model")
        model = load_model(arguments.model)
        with listening(say, say.expect):
            if arguments.check:
                return _check(arguments, model, form)
            if form == "html":
                return _write(arguments, _html(arguments, model))
            plan, views = _views(arguments, model)
    if form == "text" and arguments.output is None:
        from bnrestructure.report.graph_page import print_page

        print_page(stdout(), arguments.model, _stage(arguments), plan, views, backward=arguments.backward)
        return 0
    return _write(arguments, _document(form, arguments, plan, views))


def _write(arguments: argparse.Namespace, document: str) -> int:
    """To --output or to standard output. Exit status 0."""
    from bnrestructure.core.errors import UsageError

    if arguments.output is None:
        print(document)
        return 0
    try:
        arguments.output.write_text(document + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {arguments.output}: {error.strerror}") from error
    return 0


def _check(arguments: argparse.Namespace, model: nn.Module, form: str) -> int:
    """Rewrite every region once more, look at the graph after each pass, and say what was seen."""
    from bnrestructure.api import _options
    from bnrestructure.cli.output import stdout
    from bnrestructure.plan.survey import take_survey
    from bnrestructure.report.graph_check import check_region, print_checks

    options = _options(model, arguments.backend, _passes(arguments), None)
    regions = take_survey(model, replace(options, passes=(), backend="auto")).regions
    stages = {region.path: check_region(region.after, options.passes, options.backend) for region in regions}
    ok = not any(stage.violations for of in stages.values() for stage in of)
    if form == "json":
        seen = [{"path": path, "passes": [stage.to_json() for stage in of]} for path, of in stages.items()]
        _write(arguments, json.dumps({"model": arguments.model, "ok": ok, "regions": seen}, indent=1))
    else:
        print_checks(stdout(), arguments.model, stages)
    return 0 if ok else 1


def _passes(arguments: argparse.Namespace) -> str | list[str] | None:
    """The passes whose result is to be shown."""
    from bnrestructure.core.errors import UsageError
    from bnrestructure.passes.pipeline import LADDER, PASSES, resolve

    if arguments.before:
        return []
    if arguments.after is None:
        return pass_names(arguments.passes)
    if arguments.after in LADDER:
        return str(arguments.after)
    asked = list(resolve(pass_names(arguments.passes)))
    resolve(arguments.after)  # a misspelt name is an error with a near one
    if arguments.after not in asked:
        raise UsageError(f"pass {arguments.after!r} is not among the passes asked for ({', '.join(asked)})")
    order = [name for name in PASSES if name in asked]
    return order[: order.index(arguments.after) + 1]


def _options_of(arguments: argparse.Namespace, model: nn.Module) -> Options:
    from bnrestructure.api import _options

    options = _options(model, arguments.backend, _passes(arguments), None)
    if arguments.before or arguments.after:
        options = replace(options, backend="auto")  # any other would run select-kernels behind the passes asked for
    return options


def _html(arguments: argparse.Namespace, model: nn.Module) -> str:
    from bnrestructure.models.inputs import example_inputs
    from bnrestructure.plan.planning import make_plan
    from bnrestructure.plan.survey import take_survey
    from bnrestructure.report.graph_html import compared, graph_html

    options = _options_of(arguments, model)
    inputs = example_inputs(arguments.model, model, batch=arguments.batch, size=arguments.input_size, source=arguments.inputs)
    survey = take_survey(model, options, inputs)
    plan = make_plan(model, options, inputs, survey)
    return graph_html(f"{arguments.model}, {_stage(arguments)}", plan, compared(survey, plan))


def _views(arguments: argparse.Namespace, model: nn.Module) -> tuple[Plan, list[RegionView]]:
    from bnrestructure.plan.planning import make_plan
    from bnrestructure.plan.survey import take_survey
    from bnrestructure.report.graph_view import view_region

    options = _options_of(arguments, model)
    survey = take_survey(model, options)
    plan = make_plan(model, options, survey=survey)
    # before any pass, every site would be called kept; that is not a refusal
    sites = {} if arguments.before else {site.name: site for site in plan.sites}
    views = [
        view_region(region.path, before if arguments.before else region.after, before, sites)
        for region in survey.regions
        if (before := region.before) is not None
    ]
    return plan, views


def _stage(arguments: argparse.Namespace) -> str:
    from bnrestructure.report.graph_page import AS_CAPTURED

    return AS_CAPTURED if arguments.before else f"after {arguments.after}" if arguments.after else "rewritten"


def _document(form: str, arguments: argparse.Namespace, plan: Plan, views: list[RegionView]) -> str:
    title = f"{arguments.model}, {_stage(arguments)}"
    if form == "json":
        data: dict[str, Any] = {
            "model": arguments.model,
            "graph": _stage(arguments),
            "order": "backward" if arguments.backward else "forward",
            "regions": [view.to_json() for view in views],
            "plan": plan.to_json(),
        }
        if arguments.backward:
            for region in data["regions"]:
                region["nodes"].reverse()
        return json.dumps(data, indent=1)
    if form == "dot":
        from bnrestructure.report.graph_dot import graph_dot

        return graph_dot(title, views, backward=arguments.backward)
    if form == "svg":
        from bnrestructure.report.graph_svg import graph_svg

        return graph_svg(title, views, backward=arguments.backward)
    from bnrestructure.report.graph_page import page

    return page(arguments.model, _stage(arguments), plan, views, backward=arguments.backward).plain.rstrip("\n")
