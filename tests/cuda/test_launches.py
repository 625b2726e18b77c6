"""How much a training step gives a GPU to do, counted on meta tensors: kernels and small operations may not grow in number."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from needs import needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize(("model", "kernels", "operations"), [("densenet121", 906, 632), ("resnet50", 386, 131)])
def test_a_step_launches_no_more_than_it_did(model: str, kernels: int, operations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    record = importlib.import_module("benchmarks.cuda_code.record")
    step = record.record(record.prepared(model), batch=64)
    assert 0 < len(step.launches) <= kernels
    assert 0 < sum(step.operations.values()) <= operations
    assert 0 < step.forward < len(step.launches)


def test_a_step_calls_no_more_python_than_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver that does nothing. What Triton calls depends on its version, and is not counted here."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    record, host = (importlib.import_module(f"benchmarks.cuda_code.{name}") for name in ("record", "host"))
    calls = host.host_of(record.prepared("resnet50"), batch=64).calls
    assert calls["triton"] > 389 * 3  # each launch has gone through its launcher
    assert 0 < calls["bnrestructure"] <= 11_000


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_the_counter_of_batches_is_read_on_the_device_alone(momentum: float | None) -> None:
    """On meta tensors: a number that the host asked for would be an error. With a momentum the counter costs no launch of its own."""
    from bnrestructure.kernels.calls import FinalizeForward
    from bnrestructure.kernels.cuda import KERNELS
    from bnrestructure.kernels.cuda.launch import recording

    with torch.device("meta"):
        v, batches = torch.empty(8), torch.empty((), dtype=torch.int64)
    before = batches._version
    with recording() as launches:
        KERNELS.run(FinalizeForward(v, v, 10, v, v, v, v, momentum, 1e-5, batches))
    assert len(launches) == 1
    assert batches._version - before == (momentum is None)


@pytest.mark.parametrize("current", [0, 1])
def test_a_kernel_is_launched_on_its_tensors_device(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On cuda:1, whatever device is the current one; where it is that one already nothing is switched."""
    from bnrestructure.kernels.cuda import launch

    device, seen = [current], []

    @contextlib.contextmanager
    def switched(index: int) -> Iterator[None]:
        before, device[0] = device[0], index
        yield
        device[0] = before

    class Kernel:
        arg_names = ("x_ptr", "PART")

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: seen.append((device[0], grid, arguments, options["PART"]))

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: device[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(launch, "_part", lambda index: 80 + index)
    tensor: Any = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=1))
    launch.launch(Kernel(), (3,), tensor, warps=4)
    assert seen == [(1, (3,), (tensor,), 81)]
    assert device == [current]
