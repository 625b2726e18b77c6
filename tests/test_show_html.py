"""The page of both graphs, ``show --format html``: it loads nothing, and its boxes say what they make and where their halves went."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bnrestructure.cli.main import main

MODELS = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())

def reads_values():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else x

    return Reads()
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    (tmp_path / "html_models.py").write_text(MODELS)
    return str(tmp_path / "html_models.py")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_html_compares_before_and_after(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One page that loads nothing: both graphs, what each box makes and moves, and the layers that the two have in common."""
    status, out, _ = run(capsys, "show", f"{models}:net", "--format", "html", "--batch", "2", "--input-size", "10")
    assert status == 0
    before, after = (part.partition("</section>")[0] for part in out.split("<section")[1:])
    assert "@" not in re.sub(r"@media|<style>.*?</style>", "", out, flags=re.S)
    assert not re.search(r"""(src|href)=|url\((?!#)|@import""", out)
    assert 'class="body bn"' in before
    assert 'class="body bn"' not in after
    assert "2x4x8x8, 2.0 kB" in before
    assert "1 statistics" in after
    assert "site 1: fused, 13 sweeps, after restructuring 2" in after
    keys = [set(" ".join(re.findall(r'data-keys="([^"]*)"', part)).split()) for part in (before, after)]
    assert {"0", "1", "3"} <= keys[0] & keys[1]
    for part in (before, after):
        svg = ET.fromstring(part[part.index("<svg") : part.rindex("</svg>") + 6])
        boxes = [(float(r.get("x")), float(r.get("y")), float(r.get("height"))) for r in svg.iter("rect")]
        assert all(y + height <= float(svg.get("height")) for _, y, height in boxes)


def test_html_has_both_graphs_already(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--before", "--backward"):
        status, _, err = run(capsys, "show", f"{models}:net", "--format", "html", option)
        assert status == 2
        assert "without --before and --backward" in err


def test_html_of_a_model_that_reads_values(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not captured as a whole; its part is, with the shapes that it gets."""
    status, out, _ = run(capsys, "show", f"{models}:reads_values", "--format", "html", "--batch", "2", "--input-size", "10")
    assert status == 0
    assert out.count('class="node"') >= 4
    assert "2x4x8x8, 2.0 kB" in out
