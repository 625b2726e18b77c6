"""Versions, devices and kernels of this installation, for ``bnrestructure doctor`` and for bug reports."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import bnrestructure
from bnrestructure.kernels import registry
from bnrestructure.kernels.cpu import processor

__all__ = ["describe_environment", "print_environment"]

_REQUIRED = ("torch", "torchvision", "networkx", "rich")
_OPTIONAL = {
    "numpy": "numpy's generator is seeded and restored too",
    "matplotlib": "pictures of bench",
    "timm": "timm:NAME models",
    "scikit-learn": "the examples' photos and digits",
}


def describe_environment() -> dict[str, Any]:
    """Plain data: versions, cpu, cuda, kernels by implementation with the reason why one cannot run."""
    cuda: dict[str, Any] = {"available": torch.cuda.is_available(), "built_for": torch.version.cuda}
    if cuda["available"]:
        cuda["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    else:
        cuda["reason"] = (
            "PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA device"
        )
    return {
        "bnrestructure": bnrestructure.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)},
        "cpu": {
            "name": processor.name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "cuda": cuda,
        "kernels": {name: _kernels(name) for name in ("reference", "cpu", "cuda")},
    }


def _kernels(name: str) -> dict[str, Any]:
    reason = registry.unavailable_reason(name)
    if reason is None and name == "cuda" and not torch.cuda.is_available():
        reason = "there is no CUDA device to run them on"
    found: dict[str, Any] = {"available": reason is None, "reason": reason}
    if reason is None:
        kernels = None if name == "reference" else registry.implementation(name)
        found["description"] = None if kernels is None else kernels.description()  # e.g. the instruction set that was picked
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def print_environment(console: Console, found: dict[str, Any]) -> None:
    """The findings as one table."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("bnrestructure", found["bnrestructure"])
    table.add_row("python", f"{found['python']} on {found['platform']}")
    for name, version in found["packages"].items():
        use = _OPTIONAL.get(name)
        table.add_row(name, version or f"[yellow]not installed[/] [dim]({use})[/]")
    cpu, cuda = found["cpu"], found["cuda"]
    table.add_row("cpu", f"{cpu['name']}, {cpu['instructions']}, {cpu['cores']} cores, {cpu['threads']} threads in use")
    table.add_row("gpu", ", ".join(cuda["devices"]) if cuda["available"] else f"[yellow]none[/]: {cuda['reason']}")
    for name, kernels in found["kernels"].items():
        says = kernels.get("description")
        good = f"[green]can run[/]{f' ({says})' if says else ''}"
        table.add_row(f"{name} kernels", good if kernels["available"] else f"[red]cannot run[/]: {kernels['reason']}")
    console.print(table)
