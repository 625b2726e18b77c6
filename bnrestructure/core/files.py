"""Files that are never half written, and digests of what stands in some."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["digest_of", "replace_file"]


def replace_file(path: Path, text: str) -> None:
    """Give the file this text at once, in a folder that is made if it is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=path.suffix, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def digest_of(paths: Iterable[Path]) -> str:
    """Twelve hexadecimal digits that change with the contents of these files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
