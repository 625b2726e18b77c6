"""bench: rivals for memory, memory over a step, how long it will take, and pictures of all that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from bnrestructure.bench import contenders, rivals
from bnrestructure.bench.curves import memory_curve, thinned
from bnrestructure.bench.estimate import Estimate
from bnrestructure.bench.rivals import CHECKPOINTED, IN_PLACE, NO_BATCH_NORM, RIVALS_FOR_MEMORY, blocks, missing_reason, rebuilt
from bnrestructure.bench.run import run_benchmark
from bnrestructure.bench.settings import Settings
from bnrestructure.bench.workload import TrainingStep, Workload
from bnrestructure.cli.main import main
from bnrestructure.core.errors import UsageError
from bnrestructure.report.memory import saved_for_backward

FACTORY = """
from torch import nn

def make():
    body = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    class Block(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.one, self.two = body(i, o), body(o, o)
        def forward(self, x):
            return self.two(self.one(x))
    return nn.Sequential(Block(3, 16), Block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "blocks.py").write_text(FACTORY)
    return f"{tmp_path / 'blocks.py'}:make"


def made() -> nn.Module:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    return namespace["make"]().train()


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 8), ("densenet121", 4 + 3), ("mobilenet_v2", 19), ("efficientnet_b0", 1 + 16 + 1), ("googlenet", 3 + 9 + 2)],
)
def test_blocks_are_what_the_models_are_made_of(name: str, count: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    found = blocks(model)
    assert len(found) == count
    inside = {m for block in found for m in block.modules()}
    assert sum(isinstance(m, nn.BatchNorm2d) and m not in inside for m in model.modules()) <= 2


def test_a_wrapper_is_not_a_block() -> None:
    assert len(blocks(nn.Sequential(made()))) == 2


def test_checkpointed_blocks_compute_the_same_and_keep_less() -> None:
    model, again = made(), rebuilt(CHECKPOINTED, made())
    x = torch.randn(4, 3, 16, 16)
    steps = [TrainingStep(m, (x,), "cpu") for m in (model, again)]
    kept = [saved_for_backward(step.model, step) for step in steps]
    assert kept[1] < 0.7 * kept[0]
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_without_batch_norm_nothing_of_it_is_left() -> None:
    model = rebuilt(NO_BATCH_NORM, made())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 4
    model(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_in_place_abn_trains_where_it_is_installed(name: str) -> None:
    pytest.importorskip("inplace_abn")
    model = torchvision.models.get_model(name, weights=None).train()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    kept = saved_for_backward(model, TrainingStep(model, (torch.randn(2, 3, 64, 64),), "cpu"))
    again = rebuilt(IN_PLACE, model).train()
    replaced = sum(type(m).__name__ == "InPlaceABN" for m in again.modules())
    assert replaced == norms
    assert saved_for_backward(again, TrainingStep(again, (torch.randn(2, 3, 64, 64),), "cpu")) < 0.85 * kept


def test_in_place_abn_of_what_cannot_be_traced() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match=r"torch\.fx cannot trace the model"):
        rebuilt(IN_PLACE, Reads())


def test_what_cannot_be_timed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(missing_reason(IN_PLACE, "fp32"))
    assert missing_reason(CHECKPOINTED, "bf16") is None
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: name)
    assert missing_reason(IN_PLACE, "fp32") is None
    assert missing_reason(IN_PLACE, "bf16") == "it knows no autocast"


def test_a_budget_holds_while_its_step_may_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: self.register_forward_pre_hook(
        lambda module, args: seen.append(torch._functorch.config.activation_memory_budget)))  # fmt: skip
    settings = Settings("x", rivals=RIVALS_FOR_MEMORY)
    for name, budget in rivals.BUDGETS.items():
        step = contenders.build(name, Workload(made(), (torch.randn(2, 3, 8, 8),)), settings)
        step()
        step.forward()
        assert seen[-2:] == [budget, budget]
    assert torch._functorch.config.activation_memory_budget == 1.0


# --- memory over a step -----------------------------------------------------------------------------------------------


def test_the_curve_rises_in_forward_and_holds_what_is_saved() -> None:
    model = made()
    step = TrainingStep(model, (torch.randn(8, 3, 32, 32),), "cpu")
    step()
    saved = saved_for_backward(model, step)
    curve = memory_curve(step)
    places, sizes = zip(*curve, strict=True)
    assert list(places) == sorted(places)
    assert 0 <= places[0] <= 1 <= places[-1] <= 2
    at_the_turn = [size for place, size in curve if place < 1][-1]
    image = 8 * 3 * 32 * 32 * 4  # saved, too, and there before the step
    assert at_the_turn == pytest.approx(saved - image, rel=0.1)
    assert max(sizes) >= at_the_turn
    gradients = sum(p.numel() * 4 for p in model.parameters())
    assert gradients <= sizes[-1] < 0.3 * at_the_turn


def test_thinning_keeps_the_peak() -> None:
    curve = [(i / 1000, (i * 37) % 991) for i in range(1000)]
    curve[613] = (0.613, 5000)
    thin = thinned(curve, 50)
    assert len(thin) <= 52
    assert (0.613, 5000) in thin
    assert thin[-1] == curve[-1]
    assert thinned(curve[:40], 50) == curve[:40]


# --- the whole command ------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_rivals_from_the_command_line(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch.compile does not get the time it needs here, and is left out with a note."""
    figures, picture = tmp_path / "figures.json", tmp_path / "memory.svg"
    command = ["bench", factory, "--batch", "8", "--input-size", "32", "--rounds", "1", "--warmup", "1", "--backend", "reference"]
    command += ["--malloc", "tuned", "--rivals", "--against", "no-bn", "--compile-limit", "0.1", "--no-memory", "--threads", "1"]
    pytest.importorskip("matplotlib")
    assert main([*command, "--json", str(figures), "--plot", f"memory={picture}"]) == 0
    result = json.loads(figures.read_text())
    (section,) = result["sections"]
    names = {"eager channels_last", "eager contiguous", CHECKPOINTED, NO_BATCH_NORM, "restructured"}
    names |= {IN_PLACE} if missing_reason(IN_PLACE, "fp32") is None else set()
    assert set(section["variants"]) == set(result["curves"]) == names
    assert section["comparison"]["against"].startswith("eager c")  # what is no rival in speed is not the fastest one
    for name in rivals.BUDGETS:
        assert any(note.startswith(f"{name} was not timed: compilation took more than") for note in result["notes"])
    held = {name: found["held_bytes"] for name, found in section["variants"].items()}
    assert 0 < held[CHECKPOINTED] < held["eager channels_last"]
    assert "held MB" in capsys.readouterr().out
    assert "<svg" in picture.read_text()


@pytest.mark.whole
def test_the_estimate_counts_the_jobs_that_come(factory: str) -> None:
    told: list[dict[str, Any]] = []
    titles: list[str] = []

    def listener(title: str) -> Any:
        titles.append(title)
        return told.append

    least = {"rounds": 1, "warmup": 0, "malloc": ("default",), "memory": False, "threads": 1}
    settings = Settings(factory, batch=2, input_size=(8,), backend="reference", curves=True, **least)  # type: ignore[arg-type]
    run_benchmark(settings, listener)
    (message,) = (m for m in told if "step_seconds" in m)
    assert message["batch"] == 2
    estimate = Estimate(settings, message["step_seconds"], message["step_seconds"], 2.0, message["memory_efficient"])
    assert len(titles) == estimate.jobs


def test_the_estimate_in_words() -> None:
    estimate = Estimate(Settings("x", rounds=10, warmup=2, compile=True), step=1.0, small=0.1, load=5.0, memory_efficient=True)
    assert estimate.variants == ["eager channels_last", "eager contiguous", "torch.compile", "memory_efficient=True", "restructured"]
    weighed = 4 * (5 + 4 * 1.0)  # not torch.compile
    assert estimate.seconds == pytest.approx((5 + 6 * 0.1) + (5 + 6 + 1) + 2 * (5 + 12 * 5 + 5 + weighed))
    assert str(estimate) == (
        "about 4 minutes: 2 allocator settings x 5 variants x 12 steps of 1 s, and memory; "
        "torch.compile comes on top, at most 10 minutes for each of 1 variants"
    )


def test_memory_efficient_is_drawn_only_beside_rivals(tmp_path: Path) -> None:
    assert contenders.drawn(Settings("densenet121", ladder=True), True) == ["eager channels_last", "restructured"]
    beside = contenders.drawn(Settings("densenet121", ladder=True, rivals=(CHECKPOINTED,)), True)
    assert beside == ["eager channels_last", "eager contiguous", "memory_efficient=True", CHECKPOINTED, "restructured"]
