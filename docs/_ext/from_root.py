"""Pages of the repository's root as pages of the site: their links into docs/ and to other root files are put right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["setup"]

ROOT = Path(__file__).parents[2]
#: Root file -> its page here.
PAGES = {"CONTRIBUTING.md": "contributing", "ARCHITECTURE.md": "architecture", "CHANGELOG.md": "changelog"}


def _included(app: Any, relative_path: Any, parent: str, content: list[str]) -> None:
    """Sphinx calls this for included files: links as they are seen from docs/."""

    def moved(link: re.Match[str]) -> str:
        target = link[1]
        return f"]({PAGES[target]}.md)" if target in PAGES else f"]({target.removeprefix('docs/')})"

    content[0] = re.sub(r"\]\(((?:docs/)?[\w./-]+\.md)\)", moved, content[0])
    content[0] = content[0].replace("```mermaid", "```text")


def setup(app: Any) -> dict[str, bool]:
    app.connect("include-read", _included)
    return {"parallel_read_safe": True}
