"""Kernels that are wrong, racy, write elsewhere, crash, hang or run out of memory are found out in other processes, and never answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_kernels
from planted_kernels import KERNELS as PLANTED
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, Join, PoolGeometry, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels import calls, tuning
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward, NormaliseForward
from bnrestructure.kernels.cpu import KERNELS
from bnrestructure.kernels.proof import prover
from bnrestructure.kernels.proof.check import distance, fault
from bnrestructure.kernels.proof.draw import Drawn
from bnrestructure.kernels.proof.kinds import blanked, key_of, text_of
from bnrestructure.kernels.proof.prover import Proved, trusting, waiting_for_proofs

pytestmark = needs_kernels
GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
CPU = torch.device("cpu")


def image(c: int = 16, size: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, c, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


def transform(c: int = 16, act: str = "relu") -> Transform:
    return Transform(torch.randn(c), 1 + torch.rand(c), torch.randn(c), act)


def forward(dtype: torch.dtype = torch.float32, **more: Any) -> ConvForward:
    weight = torch.randn(16, 16, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    return ConvForward(image(dtype=dtype), transform(), weight, None, GEOMETRY, dtype, True, **more)


def every_call(dtype: torch.dtype) -> dict[str, Call[Any]]:
    """A call of every type, and the awkward ones: slices of a buffer, one tensor in two places, a join."""
    x, t, weight = image(dtype=dtype), transform(), forward(dtype).weight
    vector, z = torch.rand(16) + 0.5, image(dtype=dtype)
    edge = BackwardEdge(vector, vector, vector, x, vector)
    join = Join(image(dtype=dtype), transform(act="identity"), image(dtype=dtype), Transform(), "relu")
    pool = PoolGeometry((3, 3), (2, 2), (1, 1), False)
    buffer = torch.empty(3, 40, 9, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    gradient = torch.empty(3, 16, dtype=torch.float32)
    same = image(dtype=dtype)
    pooled = image(size=5, dtype=dtype)
    return {
        "conv": forward(dtype),
        "conv into a slice": forward(dtype, out=buffer[:, 8:24]),
        "conv behind a join": ConvForward(torch.empty_like(x), Transform(), weight, None, GEOMETRY, dtype, True, join=join),
        "conv backward": ConvBackward(x, edge, x, t, weight, GEOMETRY, dtype, accumulate=image(dtype=dtype)),
        "conv backward behind a join": ConvBackward(x, edge, x, Transform(), weight, GEOMETRY, dtype, join=join),
        "expanded gradient": ConvBackward(x[:, :, :1, :1].expand(x.shape), edge, x, t, weight, GEOMETRY, dtype),
        "output gradient": calls.OutputGradient(x, edge, dtype, bias=True),
        "join": calls.JoinForward(join, dtype, True),
        "join backward": calls.JoinBackward(x, (vector, vector, vector), join, z),
        "normalise": NormaliseForward(x, t, dtype, buffer[:, :16]),
        "normalise backward": calls.NormaliseBackward(z, x, t, image(dtype=dtype)),
        "statistics": calls.StatisticsForward(x),
        "statistics backward": calls.StatisticsBackward(x, vector, vector, vector),
        "squeeze": calls.SqueezeForward(x, t, dtype),
        "squeeze backward": calls.SqueezeBackward(gradient, same, x, t, same),
        "max pool": calls.MaxPoolForward(x, t, pool, dtype),
        "max pool backward": calls.MaxPoolBackward(pooled, torch.empty(pooled.shape, dtype=torch.uint8), x, t, pool),
        "finalize": calls.FinalizeForward(vector, vector, 243, vector, vector, vector.clone(), vector.clone(), 0.1, 1e-5),
        "finalize backward": calls.FinalizeBackward(vector, vector, vector),
    }


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
    assert distance(value, truth) == 0
    value[3] = 0
    assert distance(value, truth) == 1


# --- in processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Proved]]:
    """Planted kernels that have to be proved: ``prove("wrong ConvForward")``."""
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    tuning.forget()

    def make(planted: str = "", seconds: float = 120.0) -> Proved:
        monkeypatch.setenv("BNR_PLANTED", planted)
        PLANTED.answered.clear()
        return Proved(PLANTED, "planted_kernels", seconds=seconds)

    yield make
    tuning.forget()


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
    assert list(entries(tmp_path).values()) == [None]
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
        ("hangs ConvForward", "no result within", False),
    ],
)  # fmt: skip
def test_a_fault_is_found_outside_of_the_training_process(
    planted: str, said: str, kept: bool, prove: Callable[..., Proved], tmp_path: Path
) -> None:
    kernels = prove(planted, seconds=15.0 if "hangs" in planted else 120.0)
    call, other = forward(), NormaliseForward(image(), transform(), torch.float32)
    for one in (call, other):
        refused(kernels, one)
    kernels.wait()
    assert said in refused(kernels, call)
    assert [said in fault for fault in kernels.faults().values()] == [True]
    kernels.run(other)  # whatever fails, fails alone
    assert PLANTED.answered == {"NormaliseForward": 1}
    assert len(entries(tmp_path)) == (2 if kept else 1)


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
    assert sorted(fault is None for fault in entries(tmp_path).values()) == [False, True]


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
    monkeypatch.setattr(prover, "_IDLE_SECONDS", 0.1)
    kernels, before = prove(), set(prover._open)
    refused(kernels, forward())
    kernels.wait()
    (worker,) = set(prover._open) - before
    worker.process.wait(30)
