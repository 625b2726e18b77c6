"""Whether code that turns a number into text does so for a message, which decides nothing: an exception, an assertion, the screen, a log.

Any other text may name a layer or be compared with another. Python knows the place in the source of the instruction that it is at; the
expressions around that place tell what becomes of the text.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from types import CodeType, FrameType

__all__ = ["is_for_a_message"]

#: What takes text and gives nothing of it back.
_TAKES_MESSAGES = {
    "_assert", "print", "warn", "warn_once", "debug", "info", "warning", "error", "exception", "critical", "record_function",
}  # fmt: skip
#: What makes text of text.
_MAKES_TEXT = {"str", "repr", "format", "join"}
_PARTS_OF_TEXT = (ast.JoinedStr, ast.FormattedValue, ast.BinOp, ast.Tuple, ast.keyword)

_Place = tuple[int | None, int | None, int | None, int | None]


def is_for_a_message() -> bool:
    """Whether the code that has called the caller, to turn a number into text, makes a message. False where nobody can tell."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "bnrestructure.capture.sizes"):
        frame = frame.f_back
    if frame is None:
        return False
    return frame.f_globals.get("__name__") == "logging" or _makes_a_message(frame.f_code, frame.f_lasti)


@functools.lru_cache(maxsize=1024)
def _makes_a_message(code: CodeType, instruction: int) -> bool:
    place = next((place for i, place in enumerate(code.co_positions()) if 2 * i == instruction), None)
    around = None if place is None else _surroundings(code.co_filename).get(place)
    return around is not None and _is_lost(around)


@functools.lru_cache(maxsize=64)
def _surroundings(filename: str) -> dict[_Place, list[ast.AST]]:
    """Of each expression in a file, by its place: itself and what it stands in, from the inside. Nothing where there is no source."""
    found: dict[_Place, list[ast.AST]] = {}
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return found

    def visit(node: ast.AST, around: list[ast.AST]) -> None:
        here = [node, *around]
        if isinstance(node, ast.expr):
            found.setdefault((node.lineno, node.end_lineno, node.col_offset, node.end_col_offset), here)
        for child in ast.iter_child_nodes(node):
            visit(child, here)

    visit(tree, [])
    return found


def _is_lost(around: list[ast.AST]) -> bool:
    """Whether the text that the first of these makes reaches a message, through nothing but larger text."""
    for node, outside in zip(around, [*around[1:], None], strict=True):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _TAKES_MESSAGES or isinstance(outside, ast.Raise):
                return True
            if name not in _MAKES_TEXT:
                return False
        elif isinstance(node, ast.Raise | ast.Expr) or (isinstance(node, ast.Assert) and around[0] is not node.test):
            return True
        elif node is not around[0] and not isinstance(node, _PARTS_OF_TEXT):
            return False
    return False
