"""The GPU's clock and identity, with stand-ins for what needs one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from needs import needs_no_gpu

import bnrestructure
from bnrestructure.kernels import tuning
from bnrestructure.kernels.cuda import device, rule


def test_a_run_is_timed_between_two_events_after_the_cache_was_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        """Notes what is done with it; a millisecond passes with each entry of the log."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.time: int | None = None

        def record(self) -> None:
            self.time = len(log)
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "synchronize"
            assert self.time is not None
            assert end.time is not None
            return float(end.time - self.time)

    flushed = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: flushed)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    timer = device.event_timer(torch.device("cuda", 0))
    assert timer(lambda: log.extend(["run"] * 3)) == 4.0
    assert log == ["flush"] * device._FLUSHES + ["record", "run", "run", "run", "record", "synchronize"]


def test_tuning_uses_that_clock_for_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "event_timer", lambda where: f"the clock of {where}")
    on_gpu: Any = SimpleNamespace(is_cuda=True, device="cuda:1")
    assert rule.CudaRule().timer(on_gpu) == "the clock of cuda:1"
    assert rule.CudaRule().timer(torch.empty(0)) is tuning.wall_clock


def test_measurements_of_a_gpu_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """By its name, and not lost while the CPU's are looked at, even where nothing is kept on disk."""
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", str(tmp_path))
    files = set()
    for gpu in ("NVIDIA A", "NVIDIA B", "NVIDIA A"):
        device.identify_machine(gpu)
        files.add(tuning.cache_file())
    assert len(files) == 2
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", "off")
    tuning.forget()
    with tuning.measuring():
        tuning.measure("a call", {"one": lambda: None})
    device.identify_machine("NVIDIA B")
    assert tuning.measured("a call") is None
    device.identify_machine("NVIDIA A")
    assert tuning.measured("a call") is not None
    tuning.forget()


def test_a_candidate_without_enough_memory_is_out() -> None:
    def greedy() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with tuning.measuring():
        found = tuning.measure("greedy", {"modest": lambda: None, "greedy": greedy})
        assert (found.choice, list(found.milliseconds)) == ("modest", ["modest"])
        with pytest.raises(torch.OutOfMemoryError):
            tuning.measure("hopeless", {"greedy": greedy, "modest": lambda: None})
    tuning.forget()


def test_what_tune_refuses() -> None:
    model = torch.nn.Conv2d(3, 4, 1)
    for where, message in (("meta", "there are no meta kernels"), ("cpu", "on cpu and meta")):
        with pytest.raises(bnrestructure.UsageError, match=message):
            bnrestructure.tune(model.to("meta"), torch.empty(1, 3, 2, 2, device=where))


@needs_no_gpu
def test_the_command_line_tunes_for_a_gpu_only_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    from bnrestructure.cli.main import main

    assert main(["plan", "resnet18", "--backend", "cuda", "--tune"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
