"""Which code, on which machine and when: what the results of benchmarks/gpu.py are results of."""

from __future__ import annotations

import hashlib
import subprocess
import time
from pathlib import Path

from checkout import ROOT

__all__ = ["facts", "is_ours", "sources_digest"]

#: What a restructured model's training step runs.
_FOLDERS = ("bnrestructure/capture", "bnrestructure/graph", "bnrestructure/kernels", "bnrestructure/ops", "passes", "patterns")


def is_ours(part: str, name: str) -> bool:
    """Whether the unit runs our code, and must run again when that changed; PyTorch's own times stay what they are."""
    return part in ("steps", "check", "kernels") or "restructured" in name


def sources_digest(root: Path = ROOT) -> str:
    """Of the Python sources in those folders, the CUDA kernels' among them; those for the CPU are not."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _FOLDERS for path in (root / folder).rglob("*.py")):
        if "cpu" not in path.relative_to(root).parts:
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def facts() -> dict[str, str]:
    """The commit, with a + where the tree is not as it was committed, the GPU's driver and the date; "unknown" where nothing says so."""
    commit = _said("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*")
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"commit": commit, "driver": driver, "date": date, "sources": sources_digest()}


def _said(*command: str) -> str:
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said or "unknown"
