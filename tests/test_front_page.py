"""The README: short, its figures and pictures those of benchmarks/results, its links to something that is there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "docs" / "pictures"))

import figures
from draw import PICTURES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def between(mark: str) -> list[str]:
    """The lines of a generated table."""
    return README.partition(f"<!-- {mark} -->\n")[2].partition("\n<!-- end -->")[0].splitlines()


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 120
    assert len(README.split()) < 900


def test_tables_are_the_results() -> None:
    """After new measurements: ``python benchmarks/figures.py`` prints both."""
    assert between("figures") == list(figures.markdown(figures.front_rows()))
    assert between("families") == list(figures.families())


def test_the_worst_of_everything_measured_is_in_the_table() -> None:
    worst = figures.worst()
    assert worst in figures.front_rows()
    assert f"{worst.model} is the worst of all rows" in README


def test_the_headline_is_the_results() -> None:
    rows = {(row.model, row.dtype): row for row in figures.front_rows()}
    said = re.search(r"\*\*densenet121 trains (\S+) as fast in (\S+) of the memory, resnet50 (\S+) as fast in (\S+)\*\*", README)
    assert said is not None
    dense, residual = rows["densenet121", "fp32"], rows["resnet50", "fp32"]
    assert said.groups() == (f"{dense.speedup:.2f}x", f"{dense.memory:.2f}x", f"{residual.speedup:.2f}x", f"{residual.memory:.2f}x")


def test_what_is_said_of_eager_without_batch_norm_is_the_results() -> None:
    text = " ".join(README.split())
    said = re.search(r"batch norm \*left out\* takes (\S+) as long on densenet121, (\S+) on mobilenet_v2 and (\S+) on resnet50", text)
    assert said is not None
    measured = figures.without_batch_norm()
    assert said.groups() == tuple(f"{measured[f'{model} fp32']:.2f}x" for model in ("densenet121", "mobilenet_v2", "resnet50"))


def test_a_frameworks_file_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "JAX": {"seconds": [3.0, 4.0, 5.0], "resident_bytes": 3_000_000_000},
        "restructured": {"seconds": [1.0, 1.0, 2.0], "resident_bytes": 1_000_000_000},
    }
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    (tmp_path / "f.json").write_text(json.dumps({"results": {"densenet121 bf16": found}}))
    assert list(figures.frameworks("f.json"))[2:] == [
        "| densenet121 | bf16 | JAX | 4000 | 3.00x | 3000 |",
        "| densenet121 | bf16 | restructured | 1000 | 1.00x | 1000 |",
    ]


def test_every_row_has_a_family() -> None:
    named = [model for models in figures.FAMILIES.values() for model in models]
    assert sorted(named) == sorted({row.model for row in figures.rows()})


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_what_their_script_draws(name: str) -> None:
    """``python docs/pictures/draw.py`` draws them anew."""
    assert (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8") == PICTURES[name]()
    assert f"docs/pictures/{name}" in README


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_local_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_a_rivals_file_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {
        "eager channels_last": {"step": {"median": 1.0}, "held_bytes": 2_000_000_000},
        "checkpoint per block": {"step": {"median": 1.3}, "held_bytes": 800_000_000},
        "ladder rcf": {"step": {"median": 0.9}},
        "restructured": {"step": {"median": 0.6}, "held_bytes": 500_000_000},
    }
    speedups = {name: {"median": found["step"]["median"] / 0.6} for name, found in variants.items() if name != "restructured"}
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    (tmp_path / "r.json").write_text(json.dumps({"densenet121 fp32": {"sections": [{"variants": variants, "speedups": speedups}]}}))
    assert list(figures.rivals("r.json"))[2:] == [
        "| densenet121 | fp32 | eager channels_last | 1000 | 1.67x | 2000 | 0.25x |",
        "| densenet121 | fp32 | checkpoint per block | 1300 | 2.17x | 800 | 0.62x |",
        "| densenet121 | fp32 | ladder rcf | 900 | 1.50x |  |  |",
        "| densenet121 | fp32 | restructured | 600 | 1.00x | 500 | 1.00x |",
    ]
