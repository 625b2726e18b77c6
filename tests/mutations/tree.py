"""A copy of the package and its tests in a folder of its own, with one fault in it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ISA", "Fault", "StaleFaultError", "Tree", "located"]

ROOT = Path(__file__).resolve().parents[2]
#: The instruction set that faulty C++ is compiled for: every processor can run it.
ISA = "portable"


class StaleFaultError(ValueError):
    """The text that a fault changes is not there, or not only once: the table needs a look."""


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in the function (or ``Class.method``) called ``where``, of which ``guard`` should take notice.

    Functions are looked for by name in the whole package: faults survive moves. ``where`` may start with a part of the file's path and a
    colon. Without ``old`` the whole body becomes ``new``. C++ is meant where ``where`` ends with ``.h`` or ``.cpp``; a pass where it is
    ``PASS -> NODE.ARGUMENT``: the last such node that has the argument comes out of the pass with ``new``, an expression in the node's
    other arguments, instead of it.
    """

    where: str
    old: str
    new: str
    guard: str

    @property
    def is_compiled(self) -> bool:
        return self.where.endswith((".h", ".cpp"))

    @property
    def is_of_a_pass(self) -> bool:
        return " -> " in self.where

    @property
    def shown(self) -> str:
        changed = "" if self.is_of_a_pass else f"{_short(self.old) or 'all'} -> "
        return f"{self.where}: {changed}{_short(self.new) or 'nothing'}"


def _short(text: str) -> str:
    return " ".join(text.split())


def sources(root: Path) -> list[Path]:
    """The package's Python files, as they lie in the repository or in a copy."""
    folders = [root / "bnrestructure", root / "passes", root / "patterns"]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def located(fault: Fault, root: Path = ROOT) -> tuple[Path, str]:
    """The file that a fault changes, relative to ``root``, and its text with the fault. Raises StaleFaultError."""
    if fault.is_of_a_pass:
        path = root / "passes" / "pipeline.py"
        return path.relative_to(root), path.read_text() + _wrong_pass(fault)
    if fault.is_compiled:
        files = [path for path in (root / "bnrestructure").rglob(fault.where) if path.is_file()]
        spans = [(path, 0, len(path.read_text())) for path in files]
    else:
        spans = [(path, *span) for path in sources(root) for span in _functions(path, root, fault.where)]
    hits = [(path, first, last) for path, first, last in spans if fault.old in path.read_text()[first:last]]
    if len(hits) != 1:
        raise StaleFaultError(f"{fault.shown}: found in {len(hits)} of {len(spans)} functions of that name")
    (path, first, last) = hits[0]
    text = path.read_text()
    if not fault.old:
        indented = text[first : first + len(text[first:]) - len(text[first:].lstrip())]
        return path.relative_to(root), f"{text[:first]}{indented}{fault.new}\n{text[last:]}"
    if text[first:last].count(fault.old) != 1:
        raise StaleFaultError(f"{fault.shown}: found {text[first:last].count(fault.old)} times")
    return path.relative_to(root), text[:first] + text[first:last].replace(fault.old, fault.new) + text[last:]


#: What a fault of a pass adds to the pipeline: each step of that name is followed by the change of an argument.
_WRONG_PASS = """

_right_steps = steps


def steps(*args, **kwargs):
    for step in _right_steps(*args, **kwargs):
        yield _Wrong(step) if step.name == {name!r} else step


class _Wrong:
    def __init__(self, step):
        self._step = step

    def __getattr__(self, name):
        return getattr(self._step, name)

    def __call__(self, gm):
        return self._changed(self._step(gm), gm)

    def rewrite(self, gm):
        return self._changed(self._step.rewrite(gm), gm)

    def _changed(self, result, gm):
        from bnrestructure.graph.ir import fused_of

        for node in reversed(gm.graph.nodes):
            view = fused_of(node)
            called = view is not None and node.target.__name__ == {node!r}
            if called and getattr(view, {argument!r}, None) not in (None, "identity"):
                value = eval({new!r}, dict(vars(view)))
                if value != getattr(view, {argument!r}):
                    view.update(**{{{argument!r}: value}})
                    gm.recompile()
                    break
        return result
"""


def _wrong_pass(fault: Fault) -> str:
    name, _, place = fault.where.partition(" -> ")
    node, _, argument = place.partition(".")
    return _WRONG_PASS.format(name=name, node=node, argument=argument, new=fault.new)


def _functions(path: Path, root: Path, where: str) -> list[tuple[int, int]]:
    """(first, last) offsets of the functions of this name in a file, decorators and docstrings left out."""
    place, _, name = where.rpartition(":")
    text = path.read_text()
    if place not in str(path.relative_to(root)) or name.rpartition(".")[2] not in text:
        return []
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for qualified, node in _definitions(ast.parse(text).body, ""):
        if qualified == name:
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            found.append((starts[body[0].lineno - 1], starts[node.end_lineno or node.lineno]))
    return found


def _definitions(body: list[ast.stmt], prefix: str) -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found.append((prefix + node.name, node))
        elif isinstance(node, ast.ClassDef):
            found += _definitions(node.body, f"{prefix}{node.name}.")
    return found


class Tree:
    """Copies of the repository below ``folder``: one without a fault, whose compiled objects others start from, and one a fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._compiled = False

    def copy(self, name: str) -> Path:
        """A copy in which passes and patterns lie inside the package, as they are installed."""
        root = self.folder / name
        skipped = shutil.ignore_patterns("__pycache__", "_objects", ".*")
        shutil.copytree(ROOT / "bnrestructure", root / "bnrestructure", ignore=skipped)
        for folder in ("passes", "patterns"):
            shutil.copytree(ROOT / folder, root / "bnrestructure" / folder, ignore=skipped)
        shutil.copytree(ROOT / "tests", root / "tests", ignore=skipped)
        shutil.copy2(ROOT / "pyproject.toml", root)
        return root

    def without_fault(self, compiled: bool) -> Path:
        """A copy as it is; ``compiled``: with the kernels compiled for :data:`ISA`, whose objects are kept."""
        base = self.folder / "base"
        if not base.exists():
            self.copy("base")
        if compiled and not self._compiled:
            _build(base)
            self._compiled = True
        return base

    def with_fault(self, fault: Fault, name: str) -> Path:
        """A copy with this fault in it, compiled where it is C++."""
        path, text = located(fault)
        root = self.copy(name)
        moved = path if path.parts[0] == "bnrestructure" else Path("bnrestructure") / path
        (root / moved).write_text(text)
        if fault.is_compiled:
            self._compile(root, path.name)
        return root

    def _compile(self, root: Path, changed: str) -> None:
        kept = self.without_fault(compiled=True) / "bnrestructure/kernels/cpu/_objects"
        objects = root / "bnrestructure/kernels/cpu/_objects"
        shutil.copytree(kept, objects)
        for dependencies in objects.rglob("*.d"):
            if f"/{changed}" in dependencies.read_text():
                dependencies.with_suffix(".o").unlink()
        _build(root)


def _build(root: Path) -> None:
    command = [sys.executable, "-m", "bnrestructure.kernels.cpu.build", "--isa", ISA]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    if done.returncode:
        raise StaleFaultError(f"the fault does not compile: {done.stderr[-2000:]}")
