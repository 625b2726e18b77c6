"""What the site takes from elsewhere, written to docs/generated before a build: tables of the results, the command line's help,
and the graph of a small model before and after each pass."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(DOCS / "_ext")]

__all__ = ["setup"]


def write(app: Any) -> None:
    """All of it; a file that would not change is left alone, so that its page is not built anew."""
    folder = DOCS / "generated"
    made = {**_results(), "commands.md": _commands(), "proofs.md": _proofs()}
    if app.config.bnrestructure_pictures:
        from pass_pictures import pictures

        made |= {f"passes/{name}.html": picture for name, picture in pictures().items()}
    for name, text in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _results() -> dict[str, str]:
    import figures
    from zoo_expected import EXPECTED

    made = {f"{Path(name).stem}.md": _table(figures.markdown(figures._rows_of(name), full=True)) for name in figures.FILES}
    made["ladder.md"] = _table(_ladder(figures.ladder()))
    made["families.md"] = _table(figures.families())
    made["front.md"] = _table(figures.markdown(figures.front_rows()))
    made["rivals.md"] = "\n".join(_table(figures.rivals(name)) for name in figures.RIVAL_FILES)
    made["frameworks.md"] = "\n".join(_table(figures.frameworks(name)) for name in figures.FRAMEWORK_FILES)
    made["coverage.md"] = _table(_coverage(EXPECTED))
    return made


def _table(lines: Any) -> str:
    return "\n".join(lines) + "\n"


_ADDED = {
    "baseline": "the model as it is, through our graph", "rcf": "ReLU inside the convolution after it",
    "mvf": "mean and variance in one sweep", "bnff": "fission, and both halves fused",
    "icf": "across concats and residual joins: everything",
}  # fmt: skip


def _ladder(ladder: dict[str, dict[str, Any]]) -> Any:
    yield "| rung | what is added | step | speed-up | sweeps | saved | peak |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    baseline = ladder["baseline"]["step"]
    for rung, found in ladder.items():
        yield (
            f"| {rung if rung == 'baseline' else rung.upper()} | {_ADDED[rung]} "
            f"| {found['step'] * 1e3:.0f} ms | {baseline / found['step']:.2f}x "
            f"| {found['sweeps'] / 1e9:.1f} GB | {found['saved'] / 1e6:.0f} MB | {found['peak'] / 1e6:.0f} MB |"
        )


def _coverage(expected: dict[str, tuple[int, int, int, int]]) -> Any:
    yield "| model | batch norms | both halves fused | one half | untouched |"
    yield "|---|--:|--:|--:|--:|"
    for name, counts in expected.items():
        yield f"| {name} | {' | '.join(map(str, counts))} |"
    total = [sum(counts[i] for counts in expected.values()) for i in range(4)]
    yield f"| **all {len(expected)}** | {' | '.join(f'**{count}**' for count in total)} |"


def _proofs() -> str:
    """What the folder of proofs says of itself, without its heading."""
    page = ROOT / "tests" / "proofs" / "README.md"
    if not page.exists():
        return "This version has none yet.\n"
    return page.read_text(encoding="utf-8").partition("\n")[2]


def _commands() -> str:
    """The help of the command and of each subcommand, as it is printed."""
    import os

    from bnrestructure.cli.main import _SUBCOMMANDS, _parser

    os.environ["COLUMNS"] = "100"
    parser = _parser()
    (subcommands,) = (action for action in parser._actions if action.dest == "subcommand")
    parts = ["```text", parser.format_help().rstrip(), "```", ""]
    for name in _SUBCOMMANDS:
        parts += [f"## bnrestructure {name}", "", "```text", subcommands.choices[name].format_help().rstrip(), "```", ""]  # type: ignore[index]
    return "\n".join(parts)


def setup(app: Any) -> dict[str, bool]:
    app.add_config_value("bnrestructure_pictures", True, "env")
    app.connect("builder-inited", write, priority=100)
    return {"parallel_read_safe": True}
