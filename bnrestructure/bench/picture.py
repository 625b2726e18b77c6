"""Pictures of a benchmark: which there are, what they are written to, and what each consists of.

``--plot FILE`` draws the contenders (or the ladder) with the time by kind; ``--plot KIND`` or ``--plot KIND=FILE`` draws one of
``PICTURES``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnrestructure.bench import panels
from bnrestructure.core.errors import UsageError

__all__ = ["PICTURES", "Picture", "draw", "picture_of"]

_FORMATS = (".png", ".svg", ".pdf")


def _times(figure: Any, result: dict[str, Any]) -> None:
    """One row for each allocator setting: bars and stacks."""
    sections = result["sections"]
    figure.set_size_inches(11, 4.2 * len(sections))
    rows = figure.subplots(len(sections), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), section in zip(rows, sections, strict=True):
        panels.bars(left, section)
        panels.stacked(right, section["kinds"])


def _each_section(draw: Callable[[Any, dict[str, Any]], None]) -> Callable[[Any, dict[str, Any]], None]:
    def drawn(figure: Any, result: dict[str, Any]) -> None:
        sections = result["sections"]
        figure.set_size_inches(8, 4.0 * len(sections))
        for axes, section in zip(figure.subplots(len(sections), 1, squeeze=False)[:, 0], sections, strict=True):
            draw(axes, section)

    return drawn


def _sites(figure: Any, result: dict[str, Any]) -> None:
    figure.set_size_inches(9, 3.6)
    panels.sites(figure.subplots(), result["plan"])


def _memory(figure: Any, result: dict[str, Any]) -> None:
    figure.set_size_inches(8, 4.2)
    panels.curves(figure.subplots(), result["curves"])


_ALL = "all"
_DRAWN: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    _ALL: _times,
    "ladder": _each_section(panels.bars),
    "kinds": _each_section(lambda axes, section: panels.stacked(axes, section["kinds"])),
    "sites": _sites,
    "memory": _memory,
}
#: What --plot can be asked for by name.
PICTURES = tuple(name for name in _DRAWN if name != _ALL)


@dataclass(frozen=True)
class Picture:
    """What to draw and where to."""

    kind: str
    path: Path


def picture_of(text: str, model: str) -> Picture:
    """FILE, KIND or KIND=FILE of --plot; a KIND alone is written to MODEL-KIND.png here.

    Raises UsageError, before anything is measured, for a picture that could not be written.
    """
    kind, _, name = text.partition("=")
    if not name and kind in PICTURES:
        name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}-{kind}.png"
    elif not name or kind not in PICTURES:
        kind, name = _ALL, text
    path = Path(name)
    if path.suffix.lower() not in _FORMATS:
        kinds = ", ".join(PICTURES)
        raise UsageError(f"cannot draw {path.name}: expected one of {kinds}, or a file's name that ends in {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"cannot draw {path}: there is no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'bnrestructure[plots]'")
    return Picture(kind, path)


def draw(result: dict[str, Any], picture: Picture) -> None:
    """Write the picture of a benchmark's figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    _DRAWN[picture.kind](figure, result)
    settings, environment = result["settings"], result["environment"]
    figure.suptitle(
        f"{settings['model']}, batch {settings['batch']}, {settings['dtype']}, {environment['cpu']['threads']} threads, "
        f"{environment['cpu']['name'] if environment['device'] == 'cpu' else environment['device']}",
        fontsize=10,
    )
    figure.savefig(picture.path, dpi=150)
