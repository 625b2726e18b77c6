"""``bnrestructure show MODEL``: the graph of a training step, as text, dot, svg, html or json."""

from __future__ import annotations

import argparse
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
    """Print or write the graph. Exit status 0."""
    from bnrestructure.cli.output import progress, stdout
    from bnrestructure.core.errors import UsageError
    from bnrestructure.core.progress import listening
    from bnrestructure.models.models import load_model

    form = "json" if arguments.json else arguments.format
    if form == "html" and (arguments.before or arguments.backward):
        raise UsageError("--format html shows both graphs, and what each box does in backward: without --before and --backward")
    with progress(arguments.model) as say:
        say("building the model")
        model = load_model(arguments.model)
        with listening(say, say.expect):
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
    from dataclasses import replace

    from bnrestructure.api import _options

    options = _options(model, arguments.backend, _passes(arguments), None)
    if arguments.before or arguments.after:
        options = replace(options, backend="auto")  # any other would run select-kernels behind the passes asked for
    return options


def _html(arguments: argparse.Namespace, model: nn.Module) -> str:
    from bnrestructure.models.inputs import example_inputs
    from bnrestructure.plan.planning import make_plan
    from bnrestructure.report.graph_html import compared, graph_html

    options = _options_of(arguments, model)
    inputs = example_inputs(arguments.model, model, batch=arguments.batch, size=arguments.input_size, source=arguments.inputs)
    plan = make_plan(model, options, inputs)
    return graph_html(f"{arguments.model}, {_stage(arguments)}", plan, compared(model, options, plan, inputs))


def _views(arguments: argparse.Namespace, model: nn.Module) -> tuple[Plan, list[RegionView]]:
    from bnrestructure.plan.planning import make_plan, region_graphs
    from bnrestructure.report.graph_view import view_region

    options = _options_of(arguments, model)
    plan = make_plan(model, options)
    # before any pass, every site would be called kept; that is not a refusal
    sites = {} if arguments.before else {site.name: site for site in plan.sites}
    views = [
        view_region(path, before if arguments.before else after, before, sites)
        for path, before, after in region_graphs(model, options)
    ]
    return plan, views


def _stage(arguments: argparse.Namespace) -> str:
    from bnrestructure.report.graph_page import AS_CAPTURED

    return AS_CAPTURED if arguments.before else f"after {arguments.after}" if arguments.after else "rewritten"


def _document(form: str, arguments: argparse.Namespace, plan: Plan, views: list[RegionView]) -> str:
    import json

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
