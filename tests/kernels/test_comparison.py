"""Of a convolution's implementations those that are right are timed, by processes beside this one, and the fastest answers from then on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from needs import needs_kernels
from planted_kernels import KERNELS as PLANTED
from proof_calls import every_call, forward
from proving import proving
from torch import Tensor

from bnrestructure.core.edges import ConvGeometry
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import Call, ConvForward
from bnrestructure.kernels.choice import Alternatives
from bnrestructure.kernels.cpu import KERNELS
from bnrestructure.kernels.folded import FoldedKernels
from bnrestructure.kernels.proof import pool
from bnrestructure.kernels.proof.comparison import Comparison
from bnrestructure.kernels.proof.kinds import blanked
from bnrestructure.kernels.proof.pool import Pool, Urgency
from bnrestructure.kernels.proof.prover import Proved
from bnrestructure.kernels.proof.race import race

pytestmark = needs_kernels
prove = pytest.fixture(proving)
CPU = torch.device("cpu")


def settled(kernels: Proved, *calls: Call[Any]) -> None:
    """These calls' kinds are met, and all is known of them."""
    for call in calls:
        with pytest.raises(UnsupportedCallError):
            kernels.run(call)
    kernels.wait()


def with_frames(call: Any) -> Any:
    """The same call of videos of two frames, with a kernel over one frame."""
    def frames(x: Tensor) -> Tensor:
        return torch.stack([x, x.roll(1, 0)], 2).contiguous(memory_format=torch.channels_last_3d)

    geometry = ConvGeometry(*((one, *pair) for one, pair in zip((1, 0, 1), call.geometry[:3], strict=True)), 1)  # type: ignore[misc]
    common = {"x": frames(call.x), "weight": call.weight.unsqueeze(2), "geometry": geometry}
    if isinstance(call, ConvForward):
        return replace(call, **common)
    return replace(call, dy=frames(call.dy), edge=replace(call.edge, y=frames(call.edge.y)), accumulate=None, **common)


def chosen(call: Any) -> Alternatives:
    return PLANTED.convolutions.alternatives(call, CPU)


def reason(call: Any) -> str:
    found = tuning.measured(chosen(call).node)
    assert found is not None
    return found.reason


@pytest.mark.parametrize("kind", ["ConvForward", "ConvBackward"])
def test_the_fastest_of_those_that_are_right_answers(kind: str, prove: Callable[..., Proved]) -> None:
    call = next(call for call in every_call(torch.float32).values() if type(call).__name__ == kind)
    by_rule = chosen(call)
    assert not by_rule.measured
    kernels = prove(f"slow {kind} {by_rule.chosen}")
    settled(kernels, call)
    assert chosen(call).measured
    assert chosen(call).chosen != by_rule.chosen
    assert all(f"{name} " in reason(call) for name in by_rule.names)
    kernels.run(call)
    assert (kind, by_rule.chosen) not in PLANTED.chosen
    assert not kernels.outstanding
    assert not kernels.faults()


def test_later_processes_choose_by_the_same_times(prove: Callable[..., Proved]) -> None:
    call = forward()
    settled(prove("slow ConvForward fused"), call)
    before = chosen(call)
    later = prove("slow ConvForward fused")
    settled(later, call)  # the first kind from disk is proved again
    later.run(call)
    assert chosen(call) == before
    assert before.chosen != "fused"


@pytest.mark.parametrize(
    ("planted", "said"),
    [("wrong", "from float64"), ("racy", "two runs differ"), ("crashes", "ended with status -6"), ("raises", "ptxas does not like it")],
)
@pytest.mark.parametrize("which", ["fused", "hybrid"])
def test_what_is_wrong_is_not_timed_and_another_answers(planted: str, said: str, which: str, prove: Callable[..., Proved]) -> None:
    call = forward()
    kernels = prove(f"{planted} ConvForward {which}")
    settled(kernels, call)
    measured = tuning.measured(chosen(call).node)
    assert measured is not None
    assert set(measured.milliseconds) == {"fused", "hybrid", "winograd"} - {which}
    assert f"{which} is wrong here" in measured.reason
    assert said in measured.reason
    kernels.run(call)
    assert ("ConvForward", which) not in PLANTED.chosen
    assert not kernels.faults()  # of what answers
    assert kernels.complete


@pytest.mark.parametrize("planted", ["short", "killed"])
def test_for_want_of_memory_nothing_is_decided(planted: str, prove: Callable[..., Proved]) -> None:
    call = forward()
    kernels = prove(f"{planted} ConvForward hybrid")
    settled(kernels, call)
    assert not chosen(call).measured
    assert not kernels.complete
    kernels.run(call)
    assert PLANTED.chosen == {("ConvForward", "fused"): 1}


def test_other_calls_of_a_node_are_proved_for_its_new_choice_before_that_answers(prove: Callable[..., Proved]) -> None:
    buffer = torch.empty(3, 40, 9, 9).contiguous(memory_format=torch.channels_last)
    calls = forward(), forward(out=buffer[:, 8:24])
    kernels = prove("slow ConvForward fused")
    settled(kernels, *calls)
    assert kernels.proved == 2
    for call in calls:
        kernels.run(call)
    assert ("ConvForward", "fused") not in PLANTED.chosen


def test_processes_choose_as_this_one_though_nothing_is_kept(prove: Callable[..., Proved], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", "off")
    kernels, flat = prove(), forward()
    sequence = replace(
        flat, x=flat.x[..., 0], weight=flat.weight[..., 0].contiguous(), geometry=ConvGeometry((1,), (1,), (1,), 1)
    )  # fmt: skip
    tuning.note([tuning.Measurement("conv forward of something else", "hybrid", {})])
    settled(kernels, sequence)
    assert kernels.complete
    assert kernels.run(sequence).y.shape == (3, 16, 9)


@pytest.mark.parametrize("kind", ["ConvForward", "ConvBackward"])
def test_convolutions_of_other_dimensions_are_compared_as_those_of_images(kind: str, prove: Callable[..., Proved]) -> None:
    flat = next(call for call in every_call(torch.float32).values() if type(call).__name__ == kind)
    video: Any = with_frames(flat)
    images = FoldedKernels(PLANTED).of_images(video)  # type: ignore[arg-type]
    by_rule = chosen(images)
    kernels = prove(f"slow {kind} {by_rule.chosen}")
    settled(kernels, video)
    assert chosen(images).measured
    assert chosen(images).chosen != by_rule.chosen
    kernels.run(video)
    assert (kind, by_rule.chosen) not in PLANTED.chosen
    assert not kernels.outstanding
    assert kernels.complete


def test_a_gradient_alone_says_nothing_of_the_whole_pass(prove: Callable[..., Proved]) -> None:
    call = next(call for call in every_call(torch.float32).values() if type(call).__name__ == "ConvBackward")
    kernels = prove()
    settled(kernels, replace(call, needs=(False, True, False), accumulate=None))  # type: ignore[type-var]
    assert not chosen(call).measured


def test_a_race_leaves_out_who_cannot_run() -> None:
    call = blanked(forward())
    names = list(KERNELS.convolutions.alternatives(forward(), CPU).names)

    class Refusing:
        rule = KERNELS.convolutions.rule

        def by(self, name: str) -> Any:
            return self if name == "hybrid" else KERNELS.convolutions.by(name)

        def run(self, call: Any) -> Tensor:
            raise UnsupportedCallError("no")

    found = race(Refusing(), names, call, CPU)  # type: ignore[arg-type]
    assert set(found) == {"fused", "winograd"}
    assert all(ms > 0 for ms in found.values())


def test_a_choice_must_be_clearly_faster_to_change() -> None:
    of = Alternatives("a node", ("one", "two", "three"), "two", measured=False, decides=True)
    comparison = Comparison(of)
    for name in of.names:
        assert not comparison.ready
        comparison.tell(name, "y is wrong" if name == "three" else None)
    assert comparison.ready
    assert comparison.right == ["two", "one"]
    assert comparison.measurement({"one": 0.99, "two": 1.0}) == tuning.Measurement(
        "a node", "two", {"two": 1.0, "one": 0.99}, {"three": "y is wrong"}
    )
    assert comparison.measurement({"one": 0.5, "two": 1.0}).choice == "one"  # type: ignore[union-attr]
    assert comparison.measurement({"one": 0.5}) is None  # nothing is known of what answers now
    assert comparison.measurement({}) is None


def test_one_that_is_right_needs_no_times() -> None:
    comparison = Comparison(Alternatives("a node", ("one", "two"), "one", measured=False, decides=True))
    comparison.tell("one", "y is wrong")
    comparison.tell("two", None)
    found = comparison.measurement({})
    assert found is not None
    assert found.choice == "two"
    assert found.reason == "no other is right here; one is wrong here: y is wrong"


def test_nothing_runs_beside_what_takes_times_and_what_is_needed_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    running: set[str] = set()
    seen: list[tuple[str, frozenset[str]]] = []
    lock, go, done = threading.Lock(), threading.Event(), threading.Semaphore(0)

    class Worker:
        lives = True

        def ask(self, what: dict[str, Any], seconds: float) -> dict[str, Any]:
            go.wait(30)
            with lock:
                running.add(what["name"])
                seen.append((what["name"], frozenset(running)))
            time.sleep(0.02)
            with lock:
                seen.append((what["name"], frozenset(running)))
                running.discard(what["name"])
            return {"fault": None, "last": False}

        def end(self) -> None:
            pass

    monkeypatch.setattr(pool, "_started", Worker)
    monkeypatch.setattr(pool, "MOST_WORKERS", 3)
    monkeypatch.setattr(pool, "_IDLE_SECONDS", 0.1)
    asked = Pool(30.0)
    for urgency, name in [(Urgency.ALONE, "race 1"), (Urgency.CANDIDATE, "candidate 1"), (Urgency.ALONE, "race 2")] + [
        (Urgency.NEEDED, f"needed {i}") for i in range(6)
    ]:
        asked.ask({"name": name}, urgency, lambda answer: done.release())
    go.set()
    for _ in range(9):
        assert done.acquire(timeout=30)
    assert all(beside == {name} for name, beside in seen if name.startswith("race"))
    assert max(len(beside) for _, beside in seen) > 1
    order = [name for name, _ in seen]
    assert all(order.index("race 2") > order.index(f"needed {i}") for i in range(6))
    assert order.index("race 2") > order.index("candidate 1")
