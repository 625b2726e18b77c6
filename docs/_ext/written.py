"""For the gallery: pictures that an example writes into the folder it runs in are taken into its page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

__all__ = ["pictures"]


def pictures(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """The rst of every PNG beside the example that was not there before this block."""
    from sphinx_gallery.scrapers import figure_rst

    taken = []
    for path in sorted(Path(block_vars["src_file"]).parent.glob("*.png")):
        place = next(block_vars["image_path_iterator"])
        shutil.move(path, place)
        taken.append(place)
    return figure_rst(taken, gallery_conf["src_dir"]) if taken else ""
