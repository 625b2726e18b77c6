"""Kernels that are wrong, racy, write elsewhere, crash, hang or run out of memory are found out in other processes, and never answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_kernels
from planted_kernels import KERNELS as PLANTED
from proof_calls import GEOMETRY, every_call, forward, image, transform
from proving import proving
from torch import Tensor

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import Call, ConvForward, NormaliseForward
from bnrestructure.kernels.cpu import KERNELS
from bnrestructure.kernels.proof import pool
from bnrestructure.kernels.proof.check import NotJudgedError, _difference, distance, fault
from bnrestructure.kernels.proof.draw import Drawn
from bnrestructure.kernels.proof.kinds import blanked, key_of, text_of
from bnrestructure.kernels.proof.prover import Proved, trusting, waiting_for_proofs

pytestmark = needs_kernels
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", every_call(torch.float32))
def test_kernels_that_are_right_have_no_fault(name: str, dtype: torch.dtype) -> None:
    assert fault(KERNELS, blanked(every_call(dtype)[name]), CPU) is None


@pytest.mark.parametrize("name", every_call(torch.float32))
def test_a_kind_has_one_text_and_one_key(name: str) -> None:
    one, other = every_call(torch.float32)[name], every_call(torch.float32)[name]
    assert key_of(one) == key_of(other)
    assert text_of(blanked(one)) == text_of(blanked(other))
    drawn = Drawn(blanked(one), CPU).call
    assert key_of(drawn) == key_of(one)


def test_what_a_kernel_depends_on_makes_another_kind() -> None:
    plain = forward()
    kinds = [plain, forward(torch.bfloat16), forward(out=torch.empty(3, 40, 9, 9)[:, :16])]
    kinds.append(ConvForward(plain.x.contiguous(), plain.transform, plain.weight, None, GEOMETRY, torch.float32, True))
    kinds.append(ConvForward(plain.x, transform(act="silu"), plain.weight, None, GEOMETRY, torch.float32, True))
    kinds.append(ConvForward(plain.x, plain.transform, plain.weight, None, GEOMETRY, torch.float32))
    shifted = torch.randn(plain.x.numel() + 1)[1:].as_strided(plain.x.shape, plain.x.stride(), 1)
    kinds.append(ConvForward(shifted, plain.transform, plain.weight, None, GEOMETRY, torch.float32, True))
    assert len({key_of(call) for call in kinds}) == len(kinds)
    assert len({text_of(blanked(call)) for call in kinds}) == len(kinds)


FAULTS = {
    "wrong ConvForward": "y is",
    "wrong ConvBackward": "dx is",
    "wrong NormaliseForward": "result is",
    "bent ConvForward": "y is",
    "racy ConvForward": "two runs differ in y",
    "strays NormaliseForward": "it writes to the memory of x",
}


@pytest.mark.parametrize("planted", FAULTS)
def test_what_is_wrong_is_said(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNR_PLANTED", planted)
    calls_of = {type(call).__name__: call for call in reversed(every_call(torch.float32).values())}
    found = fault(PLANTED, blanked(calls_of[planted.partition(" ")[2]]), CPU)
    assert found is not None
    assert FAULTS[planted] in found


@pytest.mark.parametrize("kind", ["ConvForward", "ConvBackward", "JoinForward", "NormaliseBackward", "MaxPoolForward"])
def test_two_percent_are_wrong_in_bfloat16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNR_PLANTED", f"bent {kind}")
    call = next(call for call in every_call(torch.bfloat16).values() if type(call).__name__ == kind)
    assert "root mean square" in str(fault(PLANTED, blanked(call), CPU))


@pytest.mark.parametrize(("field", "wrong"), [("eps", 1e-3), ("count", 2)])
def test_a_wrong_finalize_is_wrong(field: str, wrong: float) -> None:
    class Wrong:
        def run(self, call: Any) -> Any:
            return KERNELS.run(replace(call, **{field: wrong}))

    assert fault(Wrong(), blanked(every_call(torch.float32)["finalize"]), CPU) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["conv backward, to be divided", "output gradient, to be divided"])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_gradients_of_statistics_weigh_something_once_they_are_divided(name: str, factor: str) -> None:
    class Forgets:
        def run(self, call: Any) -> Any:
            return KERNELS.run(replace(call, edge=replace(call.edge, **{factor: torch.zeros_like(call.edge.a)})))

    assert fault(Forgets(), blanked(every_call(torch.float32)[name]), CPU) is not None  # type: ignore[arg-type]


def test_where_there_is_nothing_to_hold_it_against_it_is_not_judged() -> None:
    call = every_call(torch.float32)["finalize"]
    with pytest.raises(NotJudgedError):
        fault(KERNELS, blanked(replace(call, eps=-10.0)), CPU)  # type: ignore[type-var]


def test_a_kernel_that_leaves_a_value_unwritten_is_wrong() -> None:
    class Lazy:
        def run(self, call: NormaliseForward) -> Tensor:
            z = torch.empty_like(call.x)
            z[:, 1:] = KERNELS.run(call)[:, 1:]
            return z

        supports = KERNELS.supports

    found = fault(Lazy(), blanked(NormaliseForward(image(), transform(), torch.float32)), CPU)
    assert found is not None
    assert "inf from float64" in found


def test_of_a_million_values_one_may_be_on_the_other_side_of_a_kink() -> None:
    truth = torch.ones(3_000_000, dtype=torch.float64)
    value = truth.clone()
    value[:3] = 0
    assert distance(value, truth) == 1
    assert _difference(value, truth, truth, unit=1e-3) is None
    value[3] = 0
    assert "from float64" in str(_difference(value, truth, truth, unit=1e-3))


# --- in processes ------------------------------------------------------------------------------------------------------


prove = pytest.fixture(proving)


def refused(kernels: Proved, call: Call[Any]) -> str:
    with pytest.raises(UnsupportedCallError) as error:
        kernels.run(call)
    return str(error.value)


def entries(folder: Path) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for path in folder.glob("proofs-*.json"):
        found |= json.loads(path.read_text())["faults"]
    return found


def test_a_kind_answers_once_it_is_proved_and_later_processes_know(prove: Callable[..., Proved], tmp_path: Path) -> None:
    kernels, call = prove(), forward()
    assert "is being proved" in refused(kernels, call)
    assert kernels.outstanding == 1
    kernels.wait()
    assert kernels.run(call).y.shape == (3, 16, 9, 9)
    assert sorted(text.split(" ")[2] for text in entries(tmp_path)) == ["fused:", "hybrid:", "winograd:"]
    assert set(entries(tmp_path).values()) == {None}
    later = prove()
    assert "is being proved" in refused(later, call)  # the first kind from disk is held against this process
    later.wait()
    later.run(call)
    assert not later.faults()


@pytest.mark.parametrize(
    ("planted", "said", "kept"),
    [
        ("wrong ConvForward", "from float64", True), ("crashes ConvForward", "ended with status -6", True),
        ("raises ConvForward", "ptxas does not like it", True), ("short ConvForward", "out of memory", False),
        ("hangs ConvForward fused", "no result within", False), ("killed ConvForward", "ended with status -9", False),
    ],
)  # fmt: skip
def test_a_fault_is_found_outside_of_the_training_process(
    planted: str, said: str, kept: bool, prove: Callable[..., Proved], tmp_path: Path
) -> None:
    kernels = prove(planted, seconds=12.0 if "hangs" in planted else 120.0)
    call, other = forward(), NormaliseForward(image(), transform(), torch.float32)
    for one in (call, other):
        refused(kernels, one)
    kernels.wait()
    assert kernels.complete is kept
    assert said in refused(kernels, call)
    assert [said in fault for fault in kernels.faults().values()] == [True]
    kernels.run(other)  # whatever fails, fails alone
    assert PLANTED.answered == {"NormaliseForward": 1}
    found = entries(tmp_path)
    assert [said in str(fault) for text, fault in found.items() if "by fused" in text] == ([True] if kept else [])
    assert [fault for text, fault in found.items() if " by " not in text] == [None]


def test_what_was_right_and_is_wrong_now_discredits_everything_on_disk(prove: Callable[..., Proved], tmp_path: Path) -> None:
    kernels, call, other = prove(), forward(), NormaliseForward(image(), transform(), torch.float32)
    for one in (call, other):
        refused(kernels, one)
    kernels.wait()
    later = prove("wrong ConvForward")
    assert "is being proved" in refused(later, call)
    later.run(other)
    later.wait()
    assert "from float64" in refused(later, call)
    assert "is being proved" in refused(later, other)
    later.wait()
    later.run(other)
    found = entries(tmp_path)
    assert {fault is None for text, fault in found.items() if "ConvForward" in text} == {False}
    assert [fault for text, fault in found.items() if "ConvForward" not in text] == [None]


def test_those_who_judge_wait(prove: Callable[..., Proved]) -> None:
    kernels = prove()
    with waiting_for_proofs():
        kernels.run(forward())
    assert PLANTED.answered == {"ConvForward": 1}


def test_those_who_check_for_themselves_are_answered(prove: Callable[..., Proved]) -> None:
    kernels = prove()
    with trusting(kernels):
        kernels.run(forward())
    refused(kernels, forward())
    kernels.wait()


def test_a_kind_that_the_kernels_do_not_answer_is_not_proved(prove: Callable[..., Proved]) -> None:
    kernels = prove()
    refused(kernels, forward(torch.float64))
    assert not kernels.outstanding


def test_processes_end(prove: Callable[..., Proved], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_IDLE_SECONDS", 0.1)
    kernels, before = prove(), set(pool.open_workers)
    refused(kernels, forward())
    kernels.wait()
    for worker in set(pool.open_workers) - before:
        worker.process.wait(30)
