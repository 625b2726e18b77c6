"""tune(): measured choices decide, survive on disk, and hold for their own machine, shapes and threads alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from equivalence import relative_errors, training_step
from needs import needs_kernels
from torch import nn

import bnrestructure
from bnrestructure.kernels import tuning
from bnrestructure.kernels.choice import BACKWARD
from bnrestructure.kernels.cpu import rule

pytestmark = needs_kernels


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1),
    )  # fmt: skip


def _inputs() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for measurements."""
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tuning.forget()


def _pretend_fastest(monkeypatch: pytest.MonkeyPatch, forward: str, backward: str) -> None:
    """Have every measurement come out in favour of these candidates."""

    def measure(call: str, candidates: dict, timer: object) -> tuning.Measurement:
        winner = forward if " forward " in call else backward
        for run in candidates.values():
            run()
        found = tuning.Measurement(call, winner, {name: 1.0 if name == winner else 2.0 for name in candidates})
        tuning.measured(call)
        tuning._known[call] = found
        tuning._recorder.append(found)
        return found

    monkeypatch.setattr(tuning, "measure", measure)


def test_every_convolution_is_measured_once_and_never_again() -> None:
    model, x = _model(), _inputs()
    before = copy.deepcopy(model.state_dict())
    found = bnrestructure.tune(model, x)
    # The first convolution's input takes no gradient, so its backward pass has nothing to choose; the other two have.
    assert sorted(m.call.split()[1] for m in found) == ["backward"] * 2 + ["forward"] * 3
    for m in found:
        assert m.choice in m.milliseconds
        assert all(ms > 0 for ms in m.milliseconds.values())
    assert bnrestructure.tune(model, x) == []
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("backward", list(BACKWARD))
def test_what_was_measured_is_what_runs_and_its_numbers_are_right(monkeypatch: pytest.MonkeyPatch, backward: str) -> None:
    model, x = _model(), _inputs()
    _pretend_fastest(monkeypatch, "hybrid", backward)
    bnrestructure.tune(model, x)
    plan = bnrestructure.explain(model, x)
    assert {k.forward for k in plan.kernels} == {"hybrid"}
    assert [k.backward for k in plan.kernels[1:]] == [backward] * 2
    assert plan.kernels[1].forward_reason.startswith("measured: fused 2 ms, hybrid 1 ms")
    ours = training_step(bnrestructure.restructure(copy.deepcopy(model)), x)
    truth = training_step(copy.deepcopy(model).double(), x.double())
    eager = training_step(copy.deepcopy(model), x)
    worst = max(relative_errors({n: t.double() for n, t in ours.items()}, {n: t.double() for n, t in truth.items()}).values())
    allowed = max(relative_errors({n: t.double() for n, t in eager.items()}, {n: t.double() for n, t in truth.items()}).values())
    assert worst <= 2 * allowed + 1e-6


def test_another_process_finds_the_choice_on_disk(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _pretend_fastest(monkeypatch, "hybrid", "hybrid")
    bnrestructure.tune(_model(), _inputs())
    (file,) = cache.iterdir()
    assert len(json.loads(file.read_text())["measurements"]) == 5
    tuning.forget()
    assert {k.forward for k in bnrestructure.explain(_model(), _inputs()).kernels} == {"hybrid"}


def test_other_threads_shapes_and_machines_have_choices_of_their_own(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _pretend_fastest(monkeypatch, "hybrid", "hybrid")
    bnrestructure.tune(_model(), _inputs())
    by_rule = ["fused", "winograd", "fused"]
    bigger = torch.randn(2, 3, 24, 16)
    assert [k.forward for k in bnrestructure.explain(_model(), bigger).kernels] == by_rule
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert [k.forward for k in bnrestructure.explain(_model(), _inputs()).kernels] == by_rule
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(rule.processor, "name", lambda: "another processor")
    assert [k.forward for k in bnrestructure.explain(_model(), _inputs()).kernels] == by_rule


def test_a_damaged_file_is_ignored_with_a_warning(cache: Path) -> None:
    bnrestructure.tune(_model(), _inputs())
    (file,) = cache.iterdir()
    file.write_text('{"measurements": [{"call"')
    tuning.forget()
    with pytest.warns(UserWarning, match="are ignored"):
        plan = bnrestructure.explain(_model(), _inputs())
    assert not any(k.forward_reason.startswith("measured") for k in plan.kernels)


def test_an_unknown_kernel_in_the_file_is_a_warning_and_the_rule_decides(cache: Path) -> None:
    model, x = _model(), _inputs()
    bnrestructure.tune(model, x)
    (file,) = cache.iterdir()
    found = json.loads(file.read_text())
    for entry in found["measurements"]:
        entry["choice"] = "nonsense"
    file.write_text(json.dumps(found))
    tuning.forget()
    fused = bnrestructure.restructure(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="unknown kernel 'nonsense'"):
        fused(x).sum().backward()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    assert [k.forward for k in bnrestructure.explain(model, x).kernels] == ["fused", "winograd", "fused"]
    assert len(bnrestructure.tune(model, x)) == 5  # measured anew


def test_off_keeps_nothing_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    assert bnrestructure.tune(_model(), _inputs())
    assert list(tmp_path.iterdir()) == []
    assert bnrestructure.explain(_model(), _inputs()).kernels[0].forward_reason.startswith("measured")  # in this process


def test_a_model_that_fails_is_an_error_and_ends_the_measuring() -> None:
    with pytest.raises(bnrestructure.UsageError, match="the model fails on these inputs: RuntimeError"):
        bnrestructure.tune(_model(), torch.randn(2, 5, 16, 16))
    assert not tuning.is_measuring()


def test_a_candidate_must_be_clearly_faster_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: float(next(clock)))  # every run takes a second
    with tuning.measuring():
        assert tuning.measure("a tie", {"first": lambda: None, "second": lambda: None}).choice == "first"
        found = tuning.measure("a win", {"first": lambda: next(clock), "second": lambda: None})
    assert found.choice == "second"
    assert found.milliseconds == {"first": 2000.0, "second": 1000.0}


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from bnrestructure.cli.main import main

    (tmp_path / "m.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))\n"
    )
    command = ["plan", f"{tmp_path / 'm.py'}:make", "--batch", "2", "--input-size", "16", "--tune", "--json"]
    assert main(command) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert [k["name"] for k in kernels] == ["0", "3"]
    assert all(k["forward_reason"].startswith("measured: ") for k in kernels)
    assert main([*command[:-2], "--kernels"]) == 0
    assert "measured: fused" in capsys.readouterr().out


def test_convolutions_of_1d_and_3d_data_are_measured_as_those_of_images() -> None:
    clip = nn.Sequential(nn.Conv3d(2, 4, (1, 3, 3), bias=False), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 5, (3, 1, 1)))
    found = {m.call.partition(",")[0] for m in bnrestructure.tune(clip, torch.randn(2, 2, 4, 6, 6))}
    assert "conv forward float32 8x2x6x6 as it is" in found
    assert "conv forward float32 2x4x4x16 transformed" in found
    assert bnrestructure.tune(clip, torch.randn(2, 2, 4, 6, 6)) == []
    signal = nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 5, 3))
    calls = [m.call for m in bnrestructure.tune(signal, torch.randn(3, 2, 9))]
    assert any("3x4x1x7 transformed, to 5 by 1x3" in call for call in calls)
