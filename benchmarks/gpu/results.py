"""The results of benchmarks/gpu, of which code on which machine: one JSON file, written anew after each unit."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT

__all__ = ["Results", "facts", "is_ours", "sources_digest", "to_json"]


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


def to_json(value: Any, indent: int | None = None) -> str:
    """Standard JSON: a number that is none, or infinite, is written as a word."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    return value


class Results:
    """``found[part][name]`` is a unit's result. A file that cannot be read is put aside, one that cannot be written is told of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        if path.exists():
            try:
                self.found = json.loads(path.read_text())
                if not isinstance(self.found, dict):
                    raise ValueError("not an object")
            except (OSError, ValueError) as error:
                aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
                path.rename(aside)
                self.found = {}
                print(f"{path} could not be read ({error}) and is now {aside.name}; starting anew", file=sys.stderr)

    def get(self, part: str, name: str) -> dict[str, Any] | None:
        """The unit's result, or None."""
        result = self.found.get(part, {}).get(name)
        return result if isinstance(result, dict) else None

    def put(self, part: str, name: str, result: dict[str, Any]) -> None:
        """Keep a result, and write the file."""
        self.found.setdefault(part, {})[name] = result
        self._write()

    def is_of(self, environment: dict[str, Any]) -> bool:
        """Whether these are results of this environment; an empty file becomes one of them."""
        environment = {key: value for key, value in environment.items() if key != "ok"}
        if self.found.setdefault("environment", environment) != environment:
            return False
        self._write()
        return True

    def begin(self, facts: dict[str, str]) -> None:
        """Note a run, with what may differ from run to run."""
        self.found.setdefault("runs", []).append(facts)
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(to_json(self.found, indent=1) + "\n")
            os.replace(temporary, self.path)
        except OSError as error:
            print(f"{self.path} cannot be written: {error}; the results are in this output alone", file=sys.stderr)
