"""A benchmark as a picture: bars of the contenders or the ladder with their speed-up, and stacked time by kind."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from bnrestructure.bench.contenders import RESTRUCTURED
from bnrestructure.bench.kinds import KINDS
from bnrestructure.core.errors import UsageError

__all__ = ["check_picture", "draw"]

_FORMATS = (".png", ".svg", ".pdf")
# A fused node has the hue of the eager operations that it stands for, a shade darker.
_COLOURS = {
    "conv": "#8fb3d9", "fused conv": "#4a7ebb",
    "BN": "#f2a65a", "statistics": "#d9822b", "finalize": "#a85f14", "normalise": "#e8935a",
    "activation": "#f6d465", "add/cat": "#9ccc9c", "residual": "#5fa55f",
    "pool": "#c7b2de", "fused pool": "#9575bd", "other": "#c8c8c8",
}  # fmt: skip
_PLAIN, _OURS = "#9aa5b1", "#4a7ebb"


def check_picture(path: Path) -> None:
    """Raise UsageError, before anything is measured, where a picture could not be written."""
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"cannot draw {path.name}: the picture's name must end in {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"cannot draw {path}: there is no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'bnrestructure[plots]'")


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture; one row for each allocator setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sections = result["sections"]
    figure = Figure(figsize=(11, 4.2 * len(sections)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(sections), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), section in zip(rows, sections, strict=True):
        _bars(left, section)
        _stacked(right, section["kinds"])
    settings, environment = result["settings"], result["environment"]
    figure.suptitle(
        f"{settings['model']}, batch {settings['batch']}, {settings['dtype']}, "
        f"{environment['cpu']['threads']} threads, "
        f"{environment['cpu']['name'] if environment['device'] == 'cpu' else environment['device']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _bars(axes: Any, section: dict[str, Any]) -> None:
    """Median step of the rungs (of all contenders without a ladder), with quartiles and the ratio to the first."""
    variants = section["variants"]
    bars = section["ladder"] or {name: name for name in variants}
    medians = [variants[name]["step"]["median"] * 1e3 for name in bars.values()]
    spreads = [variants[name]["step"] for name in bars.values()]
    reach = [[m - s["q1"] * 1e3 for m, s in zip(medians, spreads, strict=True)],
             [s["q3"] * 1e3 - m for m, s in zip(medians, spreads, strict=True)]]  # fmt: skip
    labels = [bar if bar in variants or bar == "baseline" else bar.upper() for bar in bars]
    colours = [_OURS if name == RESTRUCTURED else _PLAIN for name in bars.values()]
    drawn = axes.barh(labels, medians, xerr=reach, color=colours, error_kw={"ecolor": "#555555", "capsize": 2})
    axes.bar_label(drawn, [f" {m:.0f} ms, {medians[0] / m:.2f}x" for m in medians], label_type="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step (median, quartiles)")
    axes.set_title(f"{'ladder' if section['ladder'] else 'contenders'}, {section['malloc']} malloc", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _stacked(axes: Any, kinds: dict[str, dict[str, dict[str, float]]]) -> None:
    """Profiled milliseconds by kind: one stack for each profiled model."""
    names = list(kinds)
    heights = dict.fromkeys(names, 0.0)
    for kind in KINDS:
        parts = [sum(kinds[name].get(kind, {}).values()) * 1e3 for name in names]
        if any(parts):
            axes.bar(names, parts, bottom=list(heights.values()), color=_COLOURS[kind], label=kind, width=0.6)
            heights = {name: heights[name] + part for name, part in zip(names, parts, strict=True)}
    axes.set_ylabel("milliseconds a step (profiled)")
    axes.set_title("time by kind of operation", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
