"""``bnrestructure verify MODEL``: equivalence in float64 and in the training dtype, over several optimiser steps."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from bnrestructure.cli.options import add_input_arguments, add_model_arguments, pass_names

if TYPE_CHECKING:
    from bnrestructure.cli.output import Steps

__all__ = ["add_arguments", "run"]

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
_DTYPES = {**_SHORT, **{name: name for name in _SHORT.values()}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments. Must not import torch."""
    add_model_arguments(parser)
    add_input_arguments(parser, batch=4)
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), help="training dtype; bf16 and fp16 are autocast (default: the model's own)"
    )
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="optimiser steps (default: %(default)s)")
    parser.add_argument(
        "--factor",
        type=float,
        default=2.0,
        metavar="F",
        help="allowed distance to float64 in units of eager's own (default: %(default)g)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Verify and print the report. Exit status 1 when the restructured model is not equivalent."""
    import torch
    from torch.utils import _pytree as pytree

    from bnrestructure.cli.output import print_json, progress, stdout
    from bnrestructure.core.errors import UsageError
    from bnrestructure.models.inputs import example_inputs
    from bnrestructure.models.models import load_model
    from bnrestructure.report.verification_table import print_report
    from bnrestructure.verification import verify

    if arguments.device.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {arguments.device!r} (devices: cpu, cuda)")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for, but PyTorch sees no CUDA device here")
    with progress(arguments.model) as say:
        runs = 2 if arguments.dtype in ("fp64", "float64") else 4  # original and restructured, in float64 and in the training dtype
        say("building the model")
        say.expect(runs * max(arguments.steps, 1) + 1)
        model = load_model(arguments.model)
        inputs = example_inputs(
            arguments.model,
            model,
            batch=arguments.batch,
            size=arguments.input_size,
            source=arguments.inputs,
            small=True,
        )
        report = verify(
            model.to(arguments.device),
            pytree.tree_map_only(torch.Tensor, lambda t: t.to(arguments.device), inputs),
            backend=arguments.backend,
            passes=pass_names(arguments.passes),
            steps=arguments.steps,
            dtype=None if arguments.dtype is None else getattr(torch, _DTYPES[arguments.dtype]),
            factor=arguments.factor,
            progress=lambda words: _say(say, words, arguments.steps),
        )
    if arguments.json:
        print_json(report.to_json())
    else:
        print_report(stdout(), report)
    return 0 if report.ok else 1


def _say(say: Steps, words: str, steps: int) -> None:
    """A trial that is added because the first went beyond a limit brings steps of its own."""
    say(words)
    if words.startswith("trial"):
        say.expect(3 * max(steps, 1) + 1)
