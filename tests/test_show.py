"""The shown graph: golden pages of small models, and the same graph as dot, svg and json.

``pytest tests/test_show.py --regenerate-golden`` writes tests/golden/show/ anew; read the difference before committing
it.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnrestructure.cli.main import main
from bnrestructure.report.names import relative, shortened

GOLDEN = Path(__file__).parent / "golden" / "show"


class Residual(nn.Module):
    """Two residual blocks, the second with a shortcut batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = nn.ModuleList([_Block(8, 8), _Block(8, 16)])
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for block in self.block:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, out // channels, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, 2, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Dense(nn.Module):
    """A dense block: one buffer, statistics shared by all layers behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(_DenseLayer(8 + 4 * i) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(20), nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(F.relu(self.norm(torch.cat(features, 1))))


class _DenseLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(y)))


class Mixed(nn.Module):
    """Squeeze-excite, depthwise, a concat of branches; a frozen, a lonely and an unreachable batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 5, 2, 2, groups=8, bias=False), nn.BatchNorm2d(8)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project, self.bn3 = nn.Conv2d(8, 6, 1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.left, self.left_bn = nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)
        self.middle, self.middle_bn = nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2)
        self.right, self.right_bn = nn.Conv2d(6, 3, 3, padding=2, dilation=2), nn.BatchNorm2d(3)
        self.last, self.frozen = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.lonely, self.unused = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn1(self.expand(x)))
        x = F.silu(self.bn2(self.depthwise(x)))
        x = x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.average(x)))))
        x = self.bn3(self.project(x))
        middle = torch.tanh(self.middle_bn(self.middle(x)))
        x = torch.cat([F.relu(self.left_bn(self.left(x))), middle, F.relu(self.right_bn(self.right(x)))], 1)
        n, c, h, w = x.size(0), x.size(1), x.size(2), x.size(3)
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.lonely(torch.tanh(self.frozen(self.last(x))))


PAGES = {
    "residual": ("Residual",),
    "residual-before": ("Residual", "--before"),
    "residual-backward": ("Residual", "--backward"),
    "residual-after-fission": ("Residual", "--after", "fission"),
    "residual-rcf": ("Residual", "--after", "rcf"),
    "dense": ("Dense",),
    "dense-backward": ("Dense", "--backward"),
    "mixed": ("Mixed",),
}


def show(capsys: pytest.CaptureFixture[str], model: str, *options: str) -> str:
    """What the command prints for a model of this file."""
    assert main(["show", f"{__file__}:{model}", "--backend", "reference", *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_golden_pages(page: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    _, text = show(capsys, *PAGES[page]).split("\n", 1)  # the heading begins with a path
    path = GOLDEN / f"{page}.txt"
    if request.config.getoption("--regenerate-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    assert max(map(len, text.splitlines())) < 240


def test_both_halves_of_every_fused_site_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(show(capsys, "Residual", "--format", "json"))
    nodes = data["regions"][0]["nodes"]
    sites = {site["name"] for site in data["plan"]["sites"] if site["status"] == "fused"}
    assert len(sites) == 6
    assert {s for node in nodes for s in node["prologue_sites"]} == sites
    assert {s for node in nodes for s in node["epilogue_sites"]} == sites
    ids = [node["id"] for node in nodes]
    assert len(set(ids)) == len(ids)
    for i, node in enumerate(nodes):
        assert set(node["inputs"]) <= set(ids[:i]), "inputs come before their readers"
        assert bool(node["inputs"]) == (node["kind"] != "input")
        assert set(node["backward"]) == {"prologue", "work", "epilogue"}
    modules = {name for name, _ in Residual().named_modules()}
    assert {node["module"] for node in nodes if node["kind"] == "conv"} <= modules


def test_refusals_carry_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(show(capsys, "Mixed", "--json"))
    marked = {node["module"]: node for node in data["regions"][0]["nodes"] if node["status"] is not None}
    assert marked["frozen"]["status"] == "kept"
    assert "eval mode" in marked["frozen"]["reason"]
    assert "neither half has a neighbour" in marked["lonely"]["reason"]
    assert "kept in memory for tanh" in marked["middle_bn"]["reason"]
    page = show(capsys, "Mixed")
    assert "unused  ! kept: nothing in the captured training graph calls it" in page


def test_backward_is_the_reverse_of_forward(capsys: pytest.CaptureFixture[str]) -> None:
    forward = json.loads(show(capsys, "Dense", "--format", "json"))["regions"][0]["nodes"]
    backward = json.loads(show(capsys, "Dense", "--format", "json", "--backward"))["regions"][0]["nodes"]
    assert backward == forward[::-1]


@pytest.mark.parametrize("model", ["Residual", "Dense", "Mixed"])
@pytest.mark.parametrize("direction", [(), ("--backward",), ("--before",)])
def test_svg_is_a_legible_picture(model: str, direction: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    root = ET.fromstring(show(capsys, model, "--format", "svg", *direction))
    space = {"svg": "http://www.w3.org/2000/svg"}
    nodes = json.loads(show(capsys, model, "--format", "json", *direction))["regions"][0]["nodes"]
    boxes = root.findall(".//svg:rect[@class='box']", space)
    assert len(boxes) == len(nodes)
    places = [_rectangle(box) for box in boxes]
    assert not any(_overlap(a, b) for i, a in enumerate(places) for b in places[:i])
    words = {text.text for text in root.findall(".//svg:text", space)}
    assert {f"{n['group']}.{n['name']}" if n["group"] else n["name"] for n in nodes} <= words
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(x >= 0 and x + w <= width and y >= 0 and y + h <= height for x, y, w, h in places)
    edges = sum(len(n["inputs"]) for n in nodes)
    assert len(root.findall(".//svg:path[@marker-end]", space)) == edges


def _rectangle(box: Any) -> tuple[float, float, float, float]:
    x, y, w, h = (float(box.attrib[k]) for k in ("x", "y", "width", "height"))
    return x, y, w, h


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def test_dot_has_every_node_and_edge_once(capsys: pytest.CaptureFixture[str]) -> None:
    dot = show(capsys, "Residual", "--format", "dot")
    nodes = json.loads(show(capsys, "Residual", "--format", "json"))["regions"][0]["nodes"]
    assert dot.count("[label=<") == len(nodes)
    assert dot.count(" -> ") == sum(len(node["inputs"]) for node in nodes)
    assert dot.count("{") == dot.count("}")
    assert 'subgraph "cluster_r0_block.1"' in dot
    assert '"r0_x" -> "r0_conv"' in dot
    assert '"r0_conv" -> "r0_x"' in show(capsys, "Residual", "--format", "dot", "--backward")


def test_output_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "graph.svg"
    assert show(capsys, "Residual", "--format", "svg", "--output", str(target)) == ""
    assert target.read_text().startswith("<svg")
    assert main(["show", f"{__file__}:Residual", "--output", str(tmp_path / "no" / "x.txt")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_after_names_a_pass_of_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{__file__}:Residual", "--after", "fuse-statistic"]) == 2
    assert "did you mean 'fuse-statistics'" in capsys.readouterr().err
    assert main(["show", f"{__file__}:Residual", "--after", "fission", "--passes", "fuse-normalise"]) == 2
    assert "not among the passes asked for" in capsys.readouterr().err


def test_regions_inside_an_untraceable_model(capsys: pytest.CaptureFixture[str]) -> None:
    page = show(capsys, "Untraceable")
    assert "region inner" in page
    assert "outer_bn  ! kept:" in page


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()
        self.outer_bn = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer_bn(self.inner(x))
        return x if x.sum() > 0 else -x


def test_names_are_seen_from_inside_their_module() -> None:
    assert relative("layer1.0.bn1", "layer1.0") == "bn1"
    assert relative("layer1.0.downsample.1", "layer1.0.downsample") == "downsample.1"
    assert relative("features.3.1", "features.3") == "features.3.1"
    assert relative("layer10.bn", "layer1") == "layer10.bn"
    assert shortened(["a.x", "a.y", "a.x", "b.z"], "a") == "x, y +1"


def test_check_looks_at_every_graph_of_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    page = show(capsys, "Untraceable", "--check")
    assert page.count("holds") == 9
    assert "inner" in page
    data = json.loads(show(capsys, "Dense", "--check", "--json", "--after", "eliminate-concat"))
    assert data["ok"] is True
    (region,) = data["regions"]
    assert [stage["name"] for stage in region["passes"]][-1] in ("eliminate-concat", "select-kernels")
    assert all(stage["violations"] == [] for stage in region["passes"])


def test_check_is_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checks.json"
    show(capsys, "Residual", "--check", "--format", "json", "--output", str(file))
    assert json.loads(file.read_text())["ok"] is True
    for options in (("--check", "--format", "svg"), ("--check", "--output", str(file)), ("--json", "--format", "dot")):
        assert main(["show", f"{__file__}:Residual", *options]) == 2


def test_check_fails_where_a_pass_breaks_a_rule(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from bnrestructure.passes import fission

    monkeypatch.setattr(fission, "remember", lambda node, **changes: None)
    assert main(["show", f"{__file__}:Residual", "--check"]) == 1
    assert "statistics breaks the rule 'remembers its halves'" in capsys.readouterr().out
