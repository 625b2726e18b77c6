"""``bnrestructure bench MODEL``: paired timings and peak memory against eager and torch.compile."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bnrestructure.cli.options import add_input_arguments

__all__ = ["add_arguments", "run"]

_EPILOG = """\
Contenders are timed in turn, round by round, in one process, after a warm-up; ratios are paired by round. The
restructured model is compared with the fastest of eager channels_last, eager contiguous and (with --compile)
torch.compile. Its numbers are checked first: exit status 1, and no time, if they are wrong."""

#: What --against takes, and the constant of bench/rivals.py that names the variant.
_AGAINST = {"no-bn": "NO_BATCH_NORM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments. Must not import torch."""
    parser.epilog = f"{_EPILOG}\n\n{parser.epilog}"
    parser.add_argument(
        "model", metavar="MODEL", help="torchvision name, package.module:factory, file.py:factory or timm:NAME"
    )
    add_input_arguments(parser, batch=16)
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--backend", default="auto", help="kernels: auto, reference, cpu or cuda (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of each operation (default: PyTorch's)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds before them (default: %(default)s)")
    parser.add_argument(
        "--malloc", choices=("default", "tuned", "both"), default="both",
        help="glibc's allocator: as it is, tuned to keep freed activations, or both in turn (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ladder", action="store_true", help="time the paper's ladder as well: baseline, RCF, MVF, BNFF, ICF"
    )
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well (compiling takes minutes)")
    parser.add_argument(
        "--compile-limit", type=float, default=600.0, metavar="S", help="seconds it may compile (default: %(default)g)"
    )
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="time other ways to train in less memory as well: checkpoints, torch.compile with a memory budget, inplace_abn",
    )
    parser.add_argument(
        "--against",
        choices=tuple(_AGAINST),
        action="append",
        default=[],
        help="time another variant as well; no-bn is eager with every batch norm left out, which no training would use",
    )
    parser.add_argument(
        "--tune", action="store_true", help="first measure the candidate kernels on these shapes, and keep the choice"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures to FILE (- for standard output, without tables)"
    )
    parser.add_argument(
        "--plot",
        metavar="WHAT",
        action="append",
        default=[],
        help="FILE (png, svg or pdf): contenders or ladder, and time by kind; or one of memory (over a step), ladder, kinds, sites "
        "(bytes of each batch norm), to MODEL-WHAT.png or, with WHAT=FILE, to FILE. Needs matplotlib",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write. Exit status 0, or 1 when the restructured model's numbers are wrong."""
    from bnrestructure.bench.picture import draw, picture_of
    from bnrestructure.bench.run import run_benchmark
    from bnrestructure.bench.table import render
    from bnrestructure.cli.bench_progress import watched
    from bnrestructure.cli.output import print_json, stdout
    from bnrestructure.core.errors import UsageError

    pictures = [picture_of(text, arguments.model) for text in arguments.plot]
    to_stdout = str(arguments.json) == "-"
    if arguments.json is not None and not to_stdout and not arguments.json.absolute().parent.is_dir():
        raise UsageError(f"cannot write {arguments.json}: there is no such folder")
    settings = settings_of(arguments, any(picture.kind == "memory" for picture in pictures))
    with watched(settings) as listener:
        result = run_benchmark(settings, listener)
    if not result["check"]["ok"]:
        for name, report in result["check"]["reports"].items():
            if not report["ok"]:
                print(f"bench: not timed, for the numbers are wrong: {name}: {report['text']}", file=sys.stderr)
        return 1
    if to_stdout:
        print_json(result)
    else:
        render(stdout(), result)
    if arguments.json is not None and not to_stdout:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for picture in pictures:
        draw(result, picture)
    return 0


def settings_of(arguments: argparse.Namespace, curves: bool = False) -> Any:
    """The Settings that the parsed arguments ask for; ``curves``: memory over a step is to be drawn.

    Raises UsageError for values that cannot be used.
    """
    import torch

    from bnrestructure.bench import rivals
    from bnrestructure.bench.settings import Settings
    from bnrestructure.core.errors import UsageError

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for, but PyTorch sees no CUDA device here")
    both = arguments.malloc == "both"
    same = (
        "batch",
        "input_size",
        "inputs",
        "dtype",
        "device",
        "backend",
        "threads",
        "rounds",
        "warmup",
        "ladder",
        "compile",
        "compile_limit",
        "tune",
        "memory",
    )
    return Settings(
        arguments.model, **{name: getattr(arguments, name) for name in same},
        malloc=("default", "tuned") if both else (arguments.malloc,),
        rivals=rivals.RIVALS_FOR_MEMORY if arguments.rivals else (),
        against=tuple(dict.fromkeys(getattr(rivals, _AGAINST[name]) for name in arguments.against)),
        curves=curves or arguments.rivals,
    )  # fmt: skip
