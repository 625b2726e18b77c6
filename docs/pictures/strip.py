"""The idea as a picture: what batch norm and its ReLU read from and write to memory between two convolutions, before and after."""

from __future__ import annotations

from svg import BLUE, FAINT, GREEN, ORANGE, arrow, box, label, line, picture

__all__ = ["strip"]

_WIDTH, _HEIGHT = 860, 236
_LEFT, _BOX = 136, 40


def strip() -> str:
    """Two rows of operations, each over a line that stands for main memory; an arrow is one trip of a whole activation."""
    parts = [*_eager(8), *_restructured(132)]
    title = (
        "Eager: convolution 1 writes y; mean and variance read y; normalise reads y and writes z; ReLU reads z and writes its output; "
        "convolution 2 reads that. Restructured: convolution 1 takes mean and variance as it writes y; "
        "convolution 2 normalises as it reads y."
    )
    return picture(_WIDTH, _HEIGHT, title, parts)


def _eager(y: float) -> list[str]:
    memory = y + _BOX + 46
    parts = [
        label(0, y + 16, "eager", size=15, bold=True), label(0, y + 34, "7 trips, y and", size=12),
        label(0, y + 50, "ReLU(z) are kept", size=12), *_memory(memory, 680),
    ]  # fmt: skip
    boxes = (
        (_LEFT, 84, "conv 1", BLUE), (270, 132, "mean, variance", ORANGE), (452, 100, "normalise", ORANGE), (602, 74, "ReLU", ORANGE),
        (726, 92, "conv 2", BLUE),
    )  # fmt: skip
    parts += [part for x, width, words, colour in boxes for part in _operation(x, y, width, words, colour)]
    trips = (
        (174, "write", "y"), (336, "read", "y"), (480, "read", "y"), (528, "write", "z"), (622, "read", "z"), (656, "write", "ReLU(z)"),
        (772, "read", ""),
    )  # fmt: skip
    return parts + [part for x, way, words in trips for part in _trip(x, y + _BOX, memory, way, words)]


def _restructured(y: float) -> list[str]:
    memory = y + _BOX + 46
    parts = [
        label(0, y + 16, "restructured", size=15, bold=True), label(0, y + 34, "2 trips, y is kept", size=12), *_memory(memory, 680),
    ]  # fmt: skip
    parts += _operation(_LEFT, y, 84, "conv 1", BLUE)
    parts += _operation(_LEFT + 84, y, 132, "mean, variance", ORANGE)
    parts += _operation(520, y, 100, "normalise", ORANGE)
    parts += _operation(620, y, 106, "ReLU", ORANGE)
    parts += _operation(726, y, 92, "conv 2", BLUE)
    for x, way, words in ((240, "write", "y"), (670, "read", "y")):
        parts += _trip(x, y + _BOX, memory, way, words)
    return parts


def _operation(x: float, y: float, width: float, words: str, colour: str) -> list[str]:
    return [
        box(x, y, width, _BOX, fill=colour, opacity=0.14, stroke=colour),
        label(x + width / 2, y + _BOX / 2 + 4.5, words, anchor="middle", colour=colour, bold=True),
    ]


def _memory(y: float, width: float) -> list[str]:
    return [line(_LEFT, y, _LEFT + width + 10, y, colour=FAINT, width=5), label(0, y + 4, "main memory", size=12)]


def _trip(x: float, top: float, memory: float, way: str, words: str) -> list[str]:
    ends = (top + 3, memory - 6) if way == "write" else (memory - 6, top + 3)
    return [arrow(x, ends[0], x, ends[1]), label(x + 7, (top + memory) / 2 + 4, words, size=12, colour=GREEN, bold=True)]
