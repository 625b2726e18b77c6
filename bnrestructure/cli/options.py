"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse

__all__ = ["add_input_arguments", "add_model_arguments", "input_size", "pass_names"]


def add_model_arguments(parser: argparse.ArgumentParser, *, passes: bool = True) -> None:
    """MODEL, --backend, --passes and --json."""
    parser.add_argument(
        "model", metavar="MODEL", help="torchvision name, package.module:factory, file.py:factory or timm:NAME"
    )
    parser.add_argument(
        "--backend", default="auto", help="kernels: auto, reference, cpu or cuda (default: %(default)s)"
    )
    if passes:
        parser.add_argument(
            "--passes",
            metavar="NAMES",
            help="names of passes with commas between, or a rung: baseline, rcf, mvf, bnff, icf (default: all)",
        )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def add_input_arguments(parser: argparse.ArgumentParser, batch: int) -> None:
    """--batch, --input-size and --inputs."""
    parser.add_argument("--batch", type=_positive, default=batch, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument(
        "--input-size",
        type=input_size,
        metavar="SIZE",
        help="N, HxW, CxHxW or CxTxHxW (default: small enough and usual for the model)",
    )
    parser.add_argument(
        "--inputs",
        metavar="FACTORY",
        help="package.module:factory or file.py:factory that returns the model's arguments as a tuple",
    )


def input_size(text: str) -> tuple[int, ...]:
    """``224``, ``192x256``, ``3x64x64`` or ``3x16x112x112`` as a tuple of ints."""
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected N, HxW, CxHxW or CxTxHxW, got {text!r}")
    return tuple(int(part) for part in parts)


def pass_names(text: str | None) -> str | list[str] | None:
    """What restructure(passes=) takes, from --passes."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names[0] if len(names) == 1 else names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)
