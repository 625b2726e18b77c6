"""The parts of a benchmark's pictures, each drawn on axes of matplotlib: bars, stacked kinds, bytes by site, memory over a step."""

from __future__ import annotations

from typing import Any

from bnrestructure.bench.contenders import EAGER_LAST, RESTRUCTURED
from bnrestructure.bench.kinds import KINDS

__all__ = ["bars", "curves", "sites", "stacked"]

# A fused node has the hue of the eager operations that it stands for, a shade darker.
_COLOURS = {
    "conv": "#8fb3d9", "fused conv": "#4a7ebb",
    "BN": "#f2a65a", "statistics": "#d9822b", "finalize": "#a85f14", "normalise": "#e8935a",
    "activation": "#f6d465", "add/cat": "#9ccc9c", "residual": "#5fa55f",
    "pool": "#c7b2de", "fused pool": "#9575bd", "other": "#c8c8c8",
}  # fmt: skip
_PLAIN, _OURS, _THEIRS = "#9aa5b1", "#4a7ebb", "#d9822b"
_OTHERS = ("#5fa55f", "#9575bd", "#b3473a", "#7a7a7a", "#c9a227", "#3f9c9c")


def bars(axes: Any, section: dict[str, Any]) -> None:
    """Median step of the rungs (of all contenders without a ladder), with quartiles and the ratio to the first."""
    variants = section["variants"]
    shown = section["ladder"] or {name: name for name in variants}
    medians = [variants[name]["step"]["median"] * 1e3 for name in shown.values()]
    spreads = [variants[name]["step"] for name in shown.values()]
    reach = [[m - s["q1"] * 1e3 for m, s in zip(medians, spreads, strict=True)],
             [s["q3"] * 1e3 - m for m, s in zip(medians, spreads, strict=True)]]  # fmt: skip
    labels = [bar if bar in variants or bar == "baseline" else bar.upper() for bar in shown]
    colours = [_OURS if name == RESTRUCTURED else _PLAIN for name in shown.values()]
    drawn = axes.barh(labels, medians, xerr=reach, color=colours, error_kw={"ecolor": "#555555", "capsize": 2})
    axes.bar_label(drawn, [f" {m:.0f} ms, {medians[0] / m:.2f}x" for m in medians], label_type="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step (median, quartiles)")
    axes.set_title(f"{'ladder' if section['ladder'] else 'contenders'}, {section['malloc']} malloc", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def stacked(axes: Any, kinds: dict[str, dict[str, dict[str, float]]]) -> None:
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


def sites(axes: Any, plan: dict[str, Any]) -> None:
    """Megabytes that each batch norm's own sweeps move in a step, before and after, in the order of the model."""
    found = plan[RESTRUCTURED]["by_site"]
    places = range(len(found))
    before, after = ([site[side] / 1e6 for site in found] for side in (1, 2))
    axes.bar(places, before, width=1.0, color=_THEIRS, alpha=0.45, label=f"eager, {sum(before):,.0f} MB in all")
    axes.bar(places, after, width=1.0, color=_OURS, label=f"restructured, {sum(after):,.0f} MB")
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(found)} batch norms in the order of the model")
    axes.set_ylabel("MB a step")
    axes.set_title("what each batch norm's sweeps move", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def curves(axes: Any, found: dict[str, list[tuple[float, int]]]) -> None:
    """Memory held over one step by each variant; the forward pass and the backward pass are each as wide as the other."""
    others = iter(_OTHERS * (1 + len(found) // len(_OTHERS)))
    for name, curve in found.items():
        colour = _OURS if name == RESTRUCTURED else _THEIRS if name == EAGER_LAST else next(others)
        places, sizes = zip(*curve, strict=True)
        megabytes = [size / 1e6 for size in sizes]
        axes.plot(places, megabytes, color=colour, linewidth=1.6, drawstyle="steps-post", label=f"{name}, at most {max(megabytes):,.0f} MB")
        if name in (RESTRUCTURED, EAGER_LAST):
            axes.fill_between(places, megabytes, color=colour, alpha=0.12, linewidth=0, step="post")
    axes.axvline(1, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 2)
    axes.set_ylim(bottom=0)
    axes.set_xticks([0.5, 1.5], ["forward", "backward"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("MB beside the model and its input")
    axes.set_title("memory over one training step", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
