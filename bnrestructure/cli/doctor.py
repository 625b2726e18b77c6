"""``bnrestructure doctor``: what this machine and this installation can run."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments. Must not import torch."""
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings. Exit status 0."""
    from bnrestructure.cli.output import print_json, stdout
    from bnrestructure.report.environment import describe_environment, print_environment

    found = describe_environment()
    if arguments.json:
        print_json(found)
    else:
        print_environment(stdout(), found)
    return 0
