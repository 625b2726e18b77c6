"""Where and with what a measurement was taken, so that its figures can be judged and repeated."""

from __future__ import annotations

import datetime as dt
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import bnrestructure
from bnrestructure.report.environment import describe_environment

__all__ = ["command_line", "environment"]


def environment(device: str) -> dict[str, Any]:
    """What ``doctor`` finds, and the device used, the date and the commit."""
    return describe_environment() | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "commit": _commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command that the user gave, as it could be pasted into a shell."""
    return shlex.join(["bnrestructure", *sys.argv[1:]])


def _commit() -> str | None:
    """The commit of the source tree that runs, marked if the tree has changes; None when installed or without git."""
    root = Path(bnrestructure.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or not allowed to read the repository
        return None
