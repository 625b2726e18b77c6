"""The front page's chart: time and memory of a training step beside each other, from the results files."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from figures import Row, front_rows
from svg import BLUE, FAINT, GREEN, box, label, line, picture

__all__ = ["chart"]

_WIDTH, _NAMES, _PANEL, _GAP = 860, 132, 338, 40
_TOP, _ROW, _BAR = 74, 36, 17
#: What a panel's width stands for: a little more than the rival's bar, for one that is slower.
_FULL = 1.08


def chart() -> str:
    """Bars of each of the README's rows: ours as a share of the fastest rival's time, and of eager's memory."""
    rows = front_rows()
    height = _TOP + _ROW * len(rows) + 16
    left, right = _NAMES, _NAMES + _PANEL + _GAP
    parts = [
        label(left, 20, "time of a training step, and speed-up", size=15, bold=True),
        label(left, 38, "the fastest of eager and torch.compile = 1", size=12),
        label(right, 20, "peak memory of a training step", size=15, bold=True),
        label(right, 38, "eager = 1", size=12),
    ]
    bottom = height - 14
    for x in (left, right):
        for share in (0.25, 0.5, 0.75, 1.0):
            at = x + _PANEL * share / _FULL
            parts.append(line(at, _TOP - 12, at, bottom, width=1.4 if share == 1 else 0.5, dashed=share != 1))
            parts.append(label(at, _TOP - 17, f"{share:g}", size=11, anchor="middle"))
    for i, row in enumerate(rows):
        y = _TOP + _ROW * i
        parts += _row(row, y, left, right)
    return picture(_WIDTH, height, _words(rows), parts)


def _row(row: Row, y: float, left: float, right: float) -> list[str]:
    time = row.step[1] / row.step[0]
    parts = [
        label(_NAMES - 12, y + 13, row.model, size=13, anchor="end", bold=True),
        label(_NAMES - 12, y + 26, f"{row.dtype}, {row.machine}", size=11, anchor="end"),
    ]
    for x, share, colour, words in ((left, time, BLUE, f"{row.speedup:.2f}x"), (right, row.memory, GREEN, f"{row.memory:.2f}x")):
        width = _PANEL * share / _FULL
        parts.append(box(x, y + 3, _PANEL / _FULL, _BAR, fill=FAINT, opacity=0.16))
        parts.append(box(x, y + 3, width, _BAR, fill=colour))
        parts.append(label(x + 8, y + 16, words, size=12, bold=True, colour="#ffffff"))
    return parts


def _words(rows: list[Row]) -> str:
    said = [f"{row.model} in {row.dtype} {row.speedup:.2f}x as fast in {row.memory:.2f}x of the memory" for row in rows]
    return "Restructured training steps: " + "; ".join(said)
