"""Training on a device whose kernels nobody has seen: the same numbers whatever is wrong with them, and a reason in the plan."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from needs import needs_kernels
from planted_kernels import KERNELS as PLANTED
from probation_processes import WORLD, train_on_probation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnrestructure
from bnrestructure.capture import probation, verdict
from bnrestructure.kernels import registry, tuning
from bnrestructure.kernels.proof.prover import Proved

pytestmark = needs_kernels
TIMED = 2 * probation._TURNS * probation._STEPS


class Net(nn.Module):
    """With parts that hold batch norms themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


class Signals(nn.Module):
    """Of sequences, with a residual join whose sum two convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.left, self.right = nn.Conv1d(16, 8, 1), nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = (self.bn2(self.conv2(x)) + x).relu()
        return self.left(x) * self.right(x)


class Training:
    """A model and a twin of it that is not restructured, trained alike."""

    def __init__(self, net: type[nn.Module] = Net, *, checkpointed: bool = False, **options: object) -> None:
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.twin, self.shape = net(), (4, 3, 8) if net is Signals else (4, 3, 8, 8)
        if net is Net:
            self.twin.to(memory_format=torch.channels_last)
        self.model = bnrestructure.restructure(copy.deepcopy(self.twin), **options)  # type: ignore[arg-type]
        self.optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (self.twin, self.model)]

    def steps(self, count: int, size: int = 8) -> None:
        """Train both, and see that they stay the same."""
        for _ in range(count):
            x = torch.randn(*self.shape[:2], *[size] * len(self.shape[2:]))
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            for model, optimizer in zip((self.twin, self.model), self.optimizers, strict=True):
                optimizer.zero_grad()
                y = checkpoint(model, x, use_reentrant=False) if self.checkpointed else model(x)
                y.square().mean().backward()
                optimizer.step()
        for theirs, ours in zip(self.twin.state_dict().values(), self.model.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @property
    def plan(self) -> bnrestructure.Plan:
        return bnrestructure.explain(self.model)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Proved]]:
    """As if the CPU were such a device, with this fault: ``plant("wrong ConvForward")``. ``compare``: convolutions' other implementations
    are proved and timed, too, which takes a while, and is what kernels/test_comparison.py is about.
    """
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(registry, "_PROVED_FIRST", {"cpu"})
    monkeypatch.setitem(registry._DEVICES, "cpu", "planted_kernels")
    monkeypatch.setattr(probation, "_MARGIN", 1e9)  # the turns of a net this small say nothing

    compared = Proved._compare

    def make(planted: str = "", *, compare: bool = False) -> Proved:
        monkeypatch.setattr(Proved, "_compare", compared if compare else lambda self, kind: None)
        monkeypatch.setenv("BNR_PLANTED", planted)
        tuning.forget()
        registry.forget_answers()
        PLANTED.answered.clear()
        kernels = registry.proved("cpu")
        assert kernels is not None
        return kernels

    yield make
    monkeypatch.undo()
    tuning.forget()
    registry.forget_answers()


def test_until_kernels_are_proved_the_own_forward_runs_and_then_they_do(plant: Callable[..., Proved]) -> None:
    kernels, training = plant(compare=True), Training()
    training.steps(3)
    assert kernels.outstanding
    assert not PLANTED.answered
    assert "its kernels are being proved on this device" in str(training.plan)
    assert training.plan.captures == {"the whole model": 1}  # its parts run their own forwards, too
    kernels.wait()
    training.steps(TIMED)
    assert "being timed" in str(training.plan)
    training.steps(2)
    assert {"ConvForward", "ConvBackward", "FinalizeForward"} <= PLANTED.answered.keys()
    assert all(site.ran for site in training.plan.sites)
    assert "its kernels were proved on this device" in str(training.plan)
    assert not kernels.faults()
    chosen = bnrestructure.explain(training.model, torch.randn(4, 3, 8, 8)).kernels
    assert {kernel.forward_reason.partition(":")[0] for kernel in chosen} == {"measured"}


@pytest.mark.parametrize("planted", ["wrong ConvForward", "wrong ConvBackward", "crashes FinalizeForward", "raises ConvBackward"])
def test_no_wrong_kernel_reaches_a_step(planted: str, plant: Callable[..., Proved]) -> None:
    kernels, training = plant(planted), Training()
    training.steps(2)
    kernels.wait()
    training.steps(TIMED + 3)
    wrong = planted.partition(" ")[2]
    assert wrong not in PLANTED.answered
    assert PLANTED.answered
    assert f"kernels for {wrong} of float32" in str(training.plan)
    assert {wrong} == {name.partition(" ")[0] for name in kernels.faults()}


@pytest.mark.parametrize("planted", ["", "wrong ConvBackward"])
def test_sequences_are_proved_as_the_calls_that_they_are(planted: str, plant: Callable[..., Proved]) -> None:
    kernels, training = plant(planted), Training(Signals, backend="cpu")
    training.steps(1)
    kernels.wait()
    training.steps(3)
    kernels.wait()  # for what the later steps alone have called
    assert PLANTED.answered
    assert not any("4x3x1x8" in name for name in kernels.faults())
    assert bool(kernels.faults()) is bool(planted)


def test_where_rewritten_steps_are_slower_the_own_forward_stays(plant: Callable[..., Proved], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probation, "_MARGIN", 1.02)
    kernels, training = plant("slow ConvForward"), Training()
    training.steps(2)
    kernels.wait()
    training.steps(TIMED + 2)
    answered = dict(PLANTED.answered)
    training.steps(2)
    assert PLANTED.answered == answered
    assert "its own forward's training steps are faster on this device" in str(training.plan)
    assert {(site.status, site.ran) for site in training.plan.sites} == {("kept", False)}
    again = plant("slow ConvForward")  # as a later process: it is known
    later = Training()
    later.steps(2)
    assert not PLANTED.answered
    assert not again.outstanding
    assert "faster on this device" in str(later.plan)


@pytest.mark.parametrize("options", [{"backend": "cpu"}, {"strict": True}])
def test_who_asks_for_it_gets_it_however_slow(
    options: dict[str, object], plant: Callable[..., Proved], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probation, "_MARGIN", 0.0)
    kernels, training = plant(), Training(**options)
    training.steps(1)
    kernels.wait()
    training.steps(1)
    assert PLANTED.answered["ConvForward"] == 3
    assert all(site.ran for site in training.plan.sites)


def test_other_sizes_are_proved_apart_and_not_without_end(plant: Callable[..., Proved]) -> None:
    kernels, training = plant(), Training(backend="cpu")
    training.steps(1, size=8)
    kernels.wait()
    training.steps(1, size=10)
    assert "ConvForward" not in PLANTED.answered
    kernels.wait()
    training.steps(1, size=10)
    assert PLANTED.answered["ConvForward"] == 3
    guarded = Training()
    for size in range(11, 20):
        training.steps(1, size=size)
        guarded.steps(1, size=size)
    assert "come in more than 8 sizes" not in str(training.plan)
    assert "come in more than 8 sizes" in str(guarded.plan)
    kernels.wait()


def test_a_checkpoint_computes_again_what_it_computed(plant: Callable[..., Proved]) -> None:
    kernels, training = plant(), Training(checkpointed=True, backend="cpu")
    images = [torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(2)]
    for _ in range(3):
        outputs = [checkpoint(training.model, x, use_reentrant=False) for x in images]
        sum(y.sum() for y in outputs).backward()
    training = Training(checkpointed=True, backend="cpu")
    training.steps(2)
    kernels.wait()
    training.steps(2)
    assert PLANTED.answered["ConvForward"]
    timed = Training(checkpointed=True)
    timed.steps(2)
    assert "cannot be timed in a checkpoint" in str(timed.plan)


@pytest.mark.parametrize("planted", ["", "wrong ConvBackward"])
def test_prove_waits_for_all_that_a_step_calls(planted: str, plant: Callable[..., Proved]) -> None:
    kernels = plant(planted)
    faults = bnrestructure.prove(Net(), torch.randn(4, 3, 8, 8))  # NCHW: kernels lay out what they make otherwise
    assert {fault.partition(" ")[0] for fault in faults} == ({"ConvBackward"} if planted else set())
    model = bnrestructure.restructure(Net(), backend="cpu")
    PLANTED.answered.clear()
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    assert not kernels.outstanding
    assert {"ConvForward", "FinalizeForward"} <= PLANTED.answered.keys()


def test_verify_judges_the_kernels_and_not_what_runs_meanwhile(plant: Callable[..., Proved]) -> None:
    plant()
    report = bnrestructure.verify(Net(), torch.randn(4, 3, 8, 8), steps=1)
    assert report.ok, str(report)
    assert PLANTED.answered["ConvForward"]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """As if this were one of two processes: ``rank(1)``."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(verdict.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(verdict.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(verdict, "_store", lambda: store)
    return lambda number: monkeypatch.setattr(verdict.dist, "get_rank", lambda: number)


needs_distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")


@needs_distributed
def test_the_first_of_several_processes_decides(plant: Callable[..., Proved], rank: Callable[[int], None]) -> None:
    kernels, first, other = plant(), Training(), Training()
    rank(1)
    other.steps(2)
    kernels.wait()
    other.steps(TIMED + 2)  # it times nothing itself
    assert "the first process times its steps" in str(other.plan)
    assert not PLANTED.answered
    rank(0)
    first.steps(2)
    kernels.wait()
    first.steps(TIMED + 1)
    assert all(site.ran for site in first.plan.sites)
    rank(1)
    PLANTED.answered.clear()
    other.steps(probation._ONE_IN)
    assert PLANTED.answered["ConvForward"]
    assert "its kernels were proved on this device" in str(other.plan)


@pytest.mark.whole
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
def test_two_processes_train_as_their_twin_and_end_with_one_program(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_probation, (str(tmp_path),), nprocs=WORLD)  # type: ignore[attr-defined]
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD))
    assert first["answered"][2] > other["answered"][2] == 0  # the first one times
    assert all(process["answered"][-1] > process["answered"][-2] for process in (first, other))
    assert all("its kernels were proved on this device" in process["plan"] for process in (first, other))


@needs_distributed
def test_the_others_stay_with_their_own_forward_where_the_first_one_does(
    plant: Callable[..., Proved], rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, first, other = plant(), Training(), Training()
    monkeypatch.setattr(probation, "_MARGIN", 0.0)
    rank(0)
    first.steps(2)
    kernels.wait()
    first.steps(TIMED + 1)
    assert "own forward's training steps are faster" in str(first.plan)
    rank(1)
    other.steps(2)
    kernels.wait()
    PLANTED.answered.clear()
    other.steps(3)
    assert not PLANTED.answered
    assert "of the first process: its own forward's training steps are faster" in str(other.plan)


@needs_distributed
def test_a_process_that_hears_nothing_keeps_its_own_forward(
    plant: Callable[..., Proved], rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("the store is gone")

    kernels, other, first = plant(), Training(), Training()
    monkeypatch.setattr(verdict, "_store", broken)
    rank(1)
    other.steps(2)
    kernels.wait()
    other.steps(3)
    assert not PLANTED.answered
    assert "of the first process: it cannot be asked: RuntimeError: the store is gone" in str(other.plan)
    rank(0)
    first.steps(TIMED + 3)
    assert all(site.ran for site in first.plan.sites)


def test_asking_costs_less_and_less(plant: Callable[..., Proved], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(verdict, "_store", lambda: SimpleNamespace(check=lambda keys: asked.append(keys)))
    waiting = probation.Probation(plant(), "a program", True, False, torch.device("cpu"))
    for _ in range(640):
        assert not waiting._heard()
    assert 64 < len(asked) < 110


@needs_distributed
def test_several_processes_that_merge_statistics_do_not_run_programs_of_two_kinds(
    plant: Callable[..., Proved], rank: Callable[[int], None]
) -> None:
    """They wait for each other in the midst of a forward pass."""
    rank(0)
    device = torch.device("cpu")
    guarded = probation.Probation(plant(), "a program", True, True, device)
    assert not guarded.rewritten()
    assert "merge their statistics" in str(guarded.reason)
    assert probation.Probation(plant(), "a program", False, True, device).rewritten()


@needs_distributed
def test_asked_for_by_name_several_processes_run_rewritten_from_the_first_step(
    plant: Callable[..., Proved], rank: Callable[[int], None]
) -> None:
    kernels, asked = plant(), Training(backend="cpu")
    rank(1)
    asked.steps(2)
    assert "the reference answers for them" in str(asked.plan)
    assert all(site.ran for site in asked.plan.sites)
    kernels.wait()
