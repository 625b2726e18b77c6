"""``bnrestructure plan MODEL``: what restructuring does to each batch norm, and why not more."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from bnrestructure.cli.options import add_input_arguments, add_model_arguments, pass_names

if TYPE_CHECKING:
    from torch import nn

    from bnrestructure.plan.plan import Plan

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments. Must not import torch."""
    add_model_arguments(parser)
    add_input_arguments(parser, batch=32)
    parser.add_argument("--kernels", action="store_true", help="list what each fused convolution runs, and why")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="first measure the candidate kernels on these shapes (a batch of --batch) and keep the choice on disk",
    )
    parser.add_argument("--strict", action="store_true", help="exit status 1 unless every batch norm is fully fused")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Exit status 0, or 1 with --strict when a site is not fully fused."""
    from bnrestructure.api import explain
    from bnrestructure.cli.output import print_json, progress, stdout
    from bnrestructure.core.progress import listening
    from bnrestructure.measure_kernels import tune
    from bnrestructure.models.inputs import example_inputs, on_gpu
    from bnrestructure.models.models import load_model
    from bnrestructure.plan.shapes import Observed
    from bnrestructure.report.plan_table import print_kernels, print_plan

    with progress(arguments.model) as say:
        say("building the model")
        model = load_model(arguments.model)
        inputs = example_inputs(
            arguments.model, model, batch=arguments.batch, size=arguments.input_size, source=arguments.inputs
        )
        if arguments.tune:
            if arguments.backend == "cuda":
                model, inputs = on_gpu(model, inputs)
            Observed(model, inputs).check()
            say("finding what there is to tune")
            say.expect(_calls(model, explain(model, inputs, backend=arguments.backend, passes=pass_names(arguments.passes))))
            tune(model, inputs, passes=pass_names(arguments.passes), progress=lambda call: say(f"tuned {call}"))
        with listening(say, say.expect):
            plan = explain(model, inputs, backend=arguments.backend, passes=pass_names(arguments.passes))
    if plan.notes and (arguments.input_size or arguments.inputs):
        Observed(model, inputs).check()
    if arguments.json:
        print_json(plan.to_json())
    else:
        print_plan(stdout(), plan, arguments.model)
        if arguments.kernels:
            print_kernels(stdout(), plan.kernels)
    return 1 if arguments.strict and plan.coverage < 1 else 0


def _calls(model: nn.Module, plan: Plan) -> int:
    """About how many kernel calls there are to time: forward and backward of each convolution whose sizes are new."""
    new = set()
    for kernel in plan.kernels:
        conv = model.get_submodule(kernel.name.partition("#")[0])
        sizes = (getattr(conv, name, None) for name in ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups"))
        new.add((kernel.shape, *sizes))
    return 2 * len(new)
