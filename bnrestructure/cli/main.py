"""The entry point of the ``bnrestructure`` command: subcommands, and errors as one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

#: Each is a module of this package with ``add_arguments(parser)`` and ``run(arguments) -> exit status``.
_SUBCOMMANDS = {
    "show": "the graph after rewriting, with the original names",
    "plan": "the site table: status, reason, sweeps and MB before -> after",
    "verify": "numerical equivalence with the original model",
    "bench": "paired timings and peak memory against eager and torch.compile",
    "doctor": "versions, device, which kernels can run here and why not",
}
_EPILOG = """\
MODEL is a torchvision name, package.module:factory, file.py:factory, or timm:NAME. No weights are ever downloaded.
Exit status: 0 all well, 1 a check failed, 2 the command cannot be carried out as given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 ok, 1 a failed check, 2 misuse (one line on stderr says what)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    run = importlib.import_module(f"bnrestructure.cli.{arguments.subcommand}").run
    from bnrestructure.core.errors import BNRestructureError

    try:
        return int(run(arguments))
    except BNRestructureError as error:
        print(f"bnrestructure {arguments.subcommand}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe (head, say) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from bnrestructure import __version__

    parser = argparse.ArgumentParser(
        prog="bnrestructure",
        description="Rewrites a training step so that batch normalisation rides on the convolutions around it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bnrestructure {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    for name, summary in _SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        importlib.import_module(f"bnrestructure.cli.{name}").add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
