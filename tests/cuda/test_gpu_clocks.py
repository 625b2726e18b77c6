"""The clocks and captures of benchmarks/gpu, and the ceilings' clock, on a CUDA that is played: in what order what is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnrestructure.bench import ceilings


class Device:
    """Plays torch.cuda: its clock goes on by a millisecond a run; a capture takes note and leaves the weights as they are."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.now, self.weights = 0.0, weights
        self.fails: Exception | None = None
        self.replays: Callable[[], object] = lambda: None

    def event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0, elapsed_time=lambda end: end.at - event.at)
        event.record = lambda: setattr(event, "at", self.now)
        return event

    @contextmanager
    def graph(self, graph: Any, stream: Any = None) -> Iterator[None]:
        before = [weight.clone() for weight in self.weights]
        yield
        for weight, old in zip(self.weights, before, strict=True):
            weight.data.copy_(old)
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    played = Device([])
    stream = SimpleNamespace(wait_stream=lambda other: None)
    parts = {
        "Event": played.event, "graph": played.graph, "synchronize": lambda: None, "Stream": lambda: stream,
        "stream": lambda s: nullcontext(), "current_stream": lambda: stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: played.replays()),
    }  # fmt: skip
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    return played


def clock(gpu: Callable[[str], ModuleType]) -> Any:
    played = object.__new__(gpu("kernels").Clock)
    played.not_captured, played._stream, played._flushed = {}, None, torch.empty(1)
    return played


def test_replays_are_timed_and_not_launches(device: Device, gpu: Callable[[str], ModuleType]) -> None:
    launches = []

    def replay() -> None:
        device.now += 3.0

    device.replays = replay
    timer = clock(gpu)
    assert timer.milliseconds("a kernel", lambda: launches.append(1)) == 3.0
    assert len(launches) == 4  # three to warm up, one captured
    assert timer.not_captured == {}


def test_what_cannot_be_captured_is_timed_by_its_launches_and_says_so(device: Device, gpu: Callable[[str], ModuleType]) -> None:
    def launch() -> None:
        device.now += 5.0

    device.fails = RuntimeError("operation not permitted when stream is capturing\nand more")
    timer = clock(gpu)
    assert timer.milliseconds("a kernel", launch) == 5.0
    assert timer.not_captured == {"a kernel": "RuntimeError: operation not permitted when stream is capturing"}
    device.fails = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        timer.milliseconds("a kernel", launch)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_replay_is_compared_with_the_step_as_it_is(device: Device, gpu: Callable[[str], ModuleType], share: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    device.weights = list(model.parameters())

    def step(factor: float = 1.0) -> Tensor:
        model.zero_grad()
        loss = model(x).square().mean()
        (factor * loss).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        return loss.detach()

    device.replays = lambda: step(share)
    losses: list[Tensor] = []
    replay, found = gpu("models").captured_step(step, model, losses)
    assert len(losses) == 4
    assert found["replayed_gradients"] == pytest.approx(1 - share, abs=1e-6)
    weight = model.weight.detach().clone()
    replay()
    assert not torch.equal(weight, model.weight)


def test_a_ceiling_is_the_best_of_many_runs_in_a_row(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_GPU_WARM_UP", 0.01)
    runs = []

    def work() -> None:
        runs.append(device.now)
        device.now += 2.0 if len(runs) % 7 else 1.0

    assert ceilings._best(work, "cuda") == pytest.approx(1e-3)
    assert len(runs) > 20


def test_on_the_cpu_a_ceiling_is_by_the_host_clock(device: Device) -> None:
    runs: list[int] = []
    assert 0 < ceilings._best(lambda: runs.append(1), "cpu") < 1
    assert len(runs) == 5
