"""What has been found of kinds of calls on this machine, kept on disk for later processes beside the measured choices.

``proofs-<digest>.json``: the digest is of the machine, the versions, and the sources of kernels and proofs; which implementation answered
is a part of an entry's text. Entries are written one by one, merged with what other processes wrote meanwhile.
"""

from __future__ import annotations

import json
import threading
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from bnrestructure.core.files import digest_of, replace_file
from bnrestructure.kernels import tuning

__all__ = ["Ledger"]


class Ledger:
    """``faults``: text of a kind -> what is wrong with it, None for nothing. ``steps``: a program's digest -> seconds of its steps."""

    def __init__(self) -> None:
        self.faults: dict[str, str | None] = {}
        self.steps: dict[str, dict[str, float]] = {}
        self._digest: str | None = None
        self._folder: Path | None = None
        self._lock = threading.RLock()

    def refresh(self) -> bool:
        """Read what is known of the machine that kernels/tuning.py was told of. Whether it is another one than before."""
        with self._lock:
            digest = f"{tuning.machine_digest()}-{_sources_digest()}"
            if digest == self._digest:
                return False
            self._digest, self._folder = digest, tuning.cache_folder()
            found = self._read()
            self.faults, self.steps = found["faults"], found["steps"]
            return True

    def put(self, text: str, fault: str | None, *, keep: bool) -> None:
        """Note what was found of a kind; ``keep``: on disk, too."""
        with self._lock:
            self.faults[text] = fault
            if keep:
                self._write({"faults": {text: fault}})

    def put_steps(self, program: str, seconds: dict[str, float]) -> None:
        """Note how long a program's steps took."""
        with self._lock:
            self.steps[program] = seconds
            self._write({"steps": {program: seconds}})

    def clear(self) -> None:
        """Forget everything, on disk too."""
        with self._lock:
            self.faults, self.steps = {}, {}
            path = self._path()
            if path is not None:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _path(self) -> Path | None:
        return None if self._folder is None else self._folder / f"proofs-{self._digest}.json"

    def _read(self) -> dict[str, Any]:
        path = self._path()
        empty: dict[str, Any] = {"faults": {}, "steps": {}}
        if path is None or not path.is_file():
            return empty
        try:
            found = json.loads(path.read_text())
            return {kind: dict(found[kind]) for kind in empty}
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"bnrestructure: proofs in {path} are ignored: {type(error).__name__}: {error}", stacklevel=2)
            return empty

    def _write(self, news: dict[str, dict[str, Any]]) -> None:
        path = self._path()
        if path is None:
            return
        known = self._read()
        for kind, entries in news.items():
            known[kind] |= entries
        try:
            replace_file(path, json.dumps({"machine": tuning.machine_facts()} | known, indent=1))
        except OSError as error:
            warnings.warn(f"bnrestructure: proofs are not kept: {error}", stacklevel=2)


@cache
def _sources_digest() -> str:
    """Of all that an answer, and the judgement of it, is made by."""
    package = Path(__file__).parents[2]
    return digest_of(sorted(path for folder in ("kernels", "core") for path in (package / folder).rglob("*.py")))
