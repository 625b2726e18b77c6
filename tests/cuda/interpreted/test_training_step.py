"""Whole training steps of restructured models through the interpreted kernels, against eager in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from equivalence import training_step
from kernels.cpu_checks import largest_error
from small_models import build, input_for
from torch import Tensor, nn

import bnrestructure
from bnrestructure.kernels import registry, tuning
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward
from bnrestructure.kernels.choice import Choice, Node
from bnrestructure.kernels.cuda import CudaKernels
from bnrestructure.kernels.cuda import rule as rules
from bnrestructure.kernels.cuda.rule import CudaRule

#: Kernels that each model's step must have run.
MODELS = {
    "residual": {
        "ConvForward",
        "ConvBackward",
        "JoinForward",
        "JoinBackward",
        "ConvForward behind a join",
        "ConvBackward behind a join",
        "FinalizeForward",
        "MaxPoolForward",
    },
    "dense": {"ConvForward", "ConvBackward", "StatisticsForward", "NormaliseForward", "NormaliseBackward"},
    "aggregation": {"ConvForward", "ConvBackward", "MaxPoolForward", "MaxPoolBackward"},
    "inverted": {"ConvForward", "ConvBackward", "ConvForward behind a join", "ConvBackward behind a join"},
    "squeeze_excite": {"ConvForward", "ConvBackward", "SqueezeForward", "SqueezeBackward"},
    "strange": {"ConvForward", "ConvBackward"},
}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """CUDA kernels stand in for the CPU's, as the interpreter runs them on CPU tensors; the names of those that ran."""
    names: set[str] = set()
    run = CudaKernels.run

    def noted(self: CudaKernels, call: Call[Any]) -> Any:
        found = run(self, call)
        joined = isinstance(call, ConvForward | ConvBackward) and call.join is not None
        names.add(type(call).__name__ + (" behind a join" if joined else ""))
        return found

    monkeypatch.setitem(registry._DEVICES, "cpu", "bnrestructure.kernels.cuda")
    monkeypatch.setattr(CudaKernels, "unavailable_reason", lambda self: None)
    monkeypatch.setattr(CudaKernels, "run", noted)
    forget_answers()
    yield names
    monkeypatch.undo()
    forget_answers()


def forget_answers() -> None:
    """Let the registry ask again which kernels there are."""
    tuning.renew()
    registry.forget_answers()


def step(model: nn.Module, x: Tensor, backend: str | None = None) -> dict[str, Tensor]:
    """One step of a copy of the model, restructured for ``backend``; eager without one."""
    model = copy.deepcopy(model)
    if backend is not None:
        bnrestructure.restructure(model, backend=backend)
    return training_step(model, x)


def nudged(t: Tensor, seed: int) -> Tensor:
    """``t`` with each element moved by up to one rounding."""
    if not t.is_floating_point():
        return t
    noise = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return t * (1 + noise * torch.finfo(t.dtype).eps)


def yardsticks(model: nn.Module, x: Tensor) -> Iterator[dict[str, Tensor]]:
    """What a step in this dtype may come to without our kernels: by the reference, by eager, and by both of nudged parameters and inputs.

    Several, since the distance of a single one from the truth is a matter of luck.
    """
    for backend in ("reference", None):
        yield step(model, x, backend)
        for seed in (1, 2):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for t in moved.parameters():
                    t.copy_(nudged(t, seed))
            yield step(moved, nudged(x, seed), backend)


def kinds_of(truth: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors to be measured against each other. A gradient that is zero (of a bias before a batch norm) has nothing but rounding
    to be measured by, and would be the largest relative error of all."""
    for kind in ("output", "gradient", "input gradient", "buffer"):
        names = [name for name in truth if name.startswith(kind + "/")]
        largest = max((float(truth[name].abs().max()) for name in names), default=0.0)
        zeros = [name for name in names if float(truth[name].abs().max()) <= 1e-12 * largest]
        yield zeros
        yield [name for name in names if name not in zeros]


def assert_as_near(model: nn.Module, x: Tensor, factor: float = 4.0) -> None:
    """Outputs, gradients and buffers are each within ``factor`` of the yardsticks' distance from eager fp64."""
    truth = step(copy.deepcopy(model).double(), x.double())
    ours, others = step(model, x, "auto"), list(yardsticks(model, x))
    assert ours.keys() == truth.keys()
    for names in kinds_of(truth):
        if not names:
            continue
        worst = max(names, key=lambda name: largest_error(ours[name], truth[name]))
        allowed = factor * max(largest_error(other[name], truth[name]) for other in others for name in names)
        assert largest_error(ours[worst], truth[worst]) <= max(allowed, torch.finfo(torch.float32).eps), worst


@pytest.mark.own_tiles
@pytest.mark.parametrize("name", MODELS)
def test_small_model(name: str, used: set[str]) -> None:
    model = build(name, torch.float32)
    x = input_for(name, torch.float32, batch=2, size=8)
    assert_as_near(model, x.contiguous(memory_format=torch.channels_last))
    assert used >= MODELS[name]


@pytest.mark.own_tiles
@pytest.mark.parametrize("name", ["residual", "dense", "inverted", "squeeze_excite"])
def test_small_model_of_hybrids(name: str, used: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution as PyTorch's own between our sweeps, where that has what the node needs."""
    ran: set[str] = set()

    def hybrid(self: CudaRule, node: Node, direction: str) -> Choice:
        names = self.candidates(node, direction)
        name = "hybrid" if "hybrid" in names else names[0]
        ran.add(name)
        return Choice(name, "the test says so")

    monkeypatch.setattr(CudaRule, "choose", hybrid)
    tuning.renew()
    x = input_for(name, torch.float32, batch=2, size=8)
    assert_as_near(build(name, torch.float32), x.contiguous(memory_format=torch.channels_last))
    assert "hybrid" in ran
    assert ("fused" in ran) == (name == "squeeze_excite")  # whose gates only the fused kernel has


@pytest.mark.whole
@pytest.mark.own_tiles
@pytest.mark.parametrize(("name", "batch", "size"), [("resnet18", 2, 64), ("densenet121", 4, 32)])
def test_whole_model(name: str, batch: int, size: int, used: set[str]) -> None:
    """A minute or two each, in processes of their own: ``TRITON_INTERPRET=1 pytest tests/cuda/interpreted -m whole``."""
    from torchvision import models

    model = models.get_model(name).train()
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    assert_as_near(model, x)
    assert used >= {"ConvForward", "ConvBackward", "FinalizeForward", "MaxPoolForward", "MaxPoolBackward"}


def test_tuning_a_model_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, used: set[str]) -> None:
    """tune() on what passes for a GPU here, with a clock of the test's: each node is measured, and the plan has the winners."""
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", str(tmp_path))
    monkeypatch.setattr(rules, "gpu_here", lambda: "Triton's interpreter")
    times = {"fused": 3.0, "hybrid": 1.0, "reference": 2.0}
    ran: list[str] = []

    def clock(run: Any) -> float:
        name = run.args[0]
        ran.append(name)
        run()
        return times.get(name, 1.5)  # a backward pass from two implementations

    monkeypatch.setattr(tuning, "wall_clock", clock)
    tuning.forget()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    try:
        found = bnrestructure.tune(model, x)
        # The first convolution's input takes no gradient: its backward pass has one product only.
        assert sorted(m.call.split()[2] for m in found) == ["backward"] * 2 + ["forward"] * 3
        assert {m.choice for m in found} == {"hybrid"}
        assert set(ran) == {"fused", "hybrid", "fused dgrad, hybrid wgrad", "hybrid dgrad, fused wgrad", "reference"}
        assert bnrestructure.tune(model, x) == []
        kernels = bnrestructure.explain(model, x, backend="cuda").kernels
        assert [k.forward for k in kernels] == ["hybrid"] * 3
        assert kernels[1].forward_reason == "measured: fused 3 ms, hybrid 1 ms, reference 2 ms"
        assert_as_near(model, x)
    finally:
        tuning.forget()


@pytest.mark.parametrize("layout", ["NCHW", "transposed", "every other channel", "the same image twice"])
def test_inputs_of_any_strides(layout: str, used: set[str]) -> None:
    """No wrong number, and no crash, for memory that the kernels cannot address: it is copied."""
    model = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1))
    x = {
        "NCHW": torch.randn(2, 4, 5, 6),
        "transposed": torch.randn(2, 4, 6, 5).transpose(2, 3),
        "every other channel": torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)[:, ::2],
        "the same image twice": torch.randn(1, 4, 5, 6).expand(2, 4, 5, 6),
    }[layout]
    strides = x.stride()
    restructured = bnrestructure.restructure(copy.deepcopy(model), backend="auto")
    output = restructured(x)
    output.square().sum().backward()
    assert x.stride() == strides
    assert used >= {"ConvForward", "ConvBackward"}
    truth = copy.deepcopy(model).double()
    expected = truth(x.double())
    expected.square().sum().backward()
    assert largest_error(output.detach(), expected.detach()) < 1e-5
    for own, its in zip(restructured.parameters(), truth.parameters(), strict=True):
        # A bias before a batch norm has a gradient of zero, and its rounding error only.
        torch.testing.assert_close(own.grad.double(), its.grad, rtol=1e-4, atol=1e-4)


def test_float64_is_left_to_the_reference(used: set[str]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1)).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    ours, truth = step(model, x, "auto"), step(model, x)
    assert used == set()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-9, atol=1e-10)
