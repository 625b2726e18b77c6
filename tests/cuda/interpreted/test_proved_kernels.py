"""The proof lets right CUDA kernels pass, whatever the call and the dtype: a false alarm would cost every GPU its kernels."""

from __future__ import annotations

import pytest
import torch
from proof_calls import every_call, forward

from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.proof.check import fault
from bnrestructure.kernels.proof.kinds import blanked
from bnrestructure.kernels.proof.race import race

CPU = torch.device("cpu")


def alternatives(name: str) -> tuple[str, ...]:
    return KERNELS.convolutions.alternatives(every_call(torch.bfloat16)[name], CPU).names


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.whole), torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", every_call(torch.float32))
def test_right_kernels_have_no_fault(name: str, dtype: torch.dtype) -> None:
    assert fault(KERNELS, blanked(every_call(dtype)[name]), CPU) is None


@pytest.mark.parametrize(("name", "by"), [(name, by) for name in ("conv", "conv backward") for by in alternatives(name)])
def test_right_implementations_have_no_fault(name: str, by: str) -> None:
    assert fault(KERNELS.convolutions.by(by), blanked(every_call(torch.bfloat16)[name]), CPU) is None


def test_they_can_be_timed_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_MOST", "_FEWEST_TURNS", "_MOST_TURNS"):
        monkeypatch.setattr(f"bnrestructure.kernels.proof.race.{limit}", 2)
    names = alternatives("conv")
    assert set(race(KERNELS.convolutions, names, blanked(forward(torch.bfloat16)), CPU)) == set(names)
