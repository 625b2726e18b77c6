"""The examples run and say what they claim. ``make demo`` runs the long one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import bnrestructure
from bnrestructure.report.memory import saved_for_backward

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples import each other as scripts do: from the folder they are in."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def imported(name: str) -> ModuleType:
    pytest.importorskip("sklearn")
    __import__(name)
    return sys.modules[name]


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_photos_are_distinct_and_normalised() -> None:
    photos, labels = imported("photos").photo_batch(6, 64)
    assert photos.shape == (6, 3, 64, 64)
    assert photos.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert all(not torch.equal(photos[i], photos[j]) for i in range(6) for j in range(i))
    assert 0.2 < photos.std() < 3


@pytest.mark.filterwarnings("error")
def test_quickstart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    run("quickstart.py", monkeypatch, "resnet18")
    said = capsys.readouterr().out
    assert "20 BN layers, 20 fused" in said
    difference = float(said.split("float64: ")[1].split()[0])
    assert difference < 1e-9
    ratio = float(said.rsplit("(", 1)[1].split("x")[0])
    assert ratio < 0.85


def test_custom_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("custom_model.py", monkeypatch)
    said = capsys.readouterr().out
    assert "9 BN layers, 5 fused, 4 partial, 0 kept" in said
    rewritten = next(line for line in said.splitlines() if line.startswith("captured and rewritten"))
    assert all(part in rewritten for part in ("the whole model", "refine.body", "recomputed.body", "watched.0"))


def test_custom_model_is_the_same_function() -> None:
    """Control flow, the checkpoint (which updates the running statistics twice, as in eager) and the hook included."""
    custom = imported("custom_model")
    original, model = custom.build().double(), bnrestructure.restructure(custom.build().double())
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    for network in (original, model):
        network(x).square().sum().backward()
    for (name, p), q in zip(original.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-10, msg=name)
    for (name, a), b in zip(original.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, msg=name)
    assert model.seen == pytest.approx(original.seen, rel=1e-9)


def test_the_demo_finds_what_it_imports() -> None:
    """It runs for minutes (``make demo``); that it starts is seen here."""
    demo = imported("demo")
    assert set(demo.MODELS) == {"densenet121", "resnet50"}


@pytest.mark.parametrize("net", ["resnet", "densenet"])
def test_digits_start_alike_and_are_learnt(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    digits = imported("train_digits")
    every = digits.Digits.load()
    few = digits.Digits(every.train_images[:600], every.train_labels[:600], every.test_images, every.test_labels)
    monkeypatch.setattr(digits.Digits, "load", lambda: few)
    compared = digits.compare(net, epochs=1)
    a, b = compared.eager.losses, compared.restructured.losses
    assert len(a) == len(b) == 6
    assert b[0] == pytest.approx(a[0], rel=1e-5)
    assert b[4] == pytest.approx(a[4], rel=1e-2)
    assert b[5] < b[0]
    digits.draw(compared, tmp_path / "new folder" / "loss.png")
    assert (tmp_path / "new folder" / "loss.png").stat().st_size > 10_000


def test_saved_for_backward_counts_each_storage_once() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.weight
            return (y * y[:1000] * y.view(10, 100).view(-1)).sum()

    model = Squares()
    x = torch.randn(1000)
    # Saved: x for the weight's gradient, y (thrice over, once as a view) and y*y; the weight is not counted.
    assert saved_for_backward(model, lambda: model(x)) == 3 * 4000
    assert saved_for_backward(model, lambda: model(x).backward()) == 3 * 4000
    with torch.no_grad():
        assert saved_for_backward(model, lambda: model(x)) == 0


def test_saved_for_backward_is_a_peak_and_not_a_sum() -> None:
    layer = nn.Linear(100, 100, bias=False)
    x = torch.randn(50, 100)

    def two_steps() -> None:
        for _ in range(2):
            layer(x).sum().backward()

    assert saved_for_backward(layer, two_steps) == 50 * 100 * 4


def test_saved_for_backward_sees_what_checkpointing_saves() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)])
    x, target = torch.randn(256, 64, requires_grad=True), torch.zeros(256, dtype=torch.long)

    def step(halves: bool) -> None:
        y = x
        for half in (body[:4], body[4:]):
            y = checkpoint(half, y, use_reentrant=False) if halves else half(y)
        cross_entropy(y, target).backward()

    assert saved_for_backward(body, lambda: step(True)) < 0.8 * saved_for_backward(body, lambda: step(False))
