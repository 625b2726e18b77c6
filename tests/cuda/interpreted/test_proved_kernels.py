"""The proof lets right CUDA kernels pass, whatever the call and the dtype: a false alarm would cost every GPU its kernels."""

from __future__ import annotations

import pytest
import torch
from proof_calls import every_call

from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.proof.check import fault
from bnrestructure.kernels.proof.kinds import blanked


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.whole), torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", every_call(torch.float32))
def test_right_kernels_have_no_fault(name: str, dtype: torch.dtype) -> None:
    assert fault(KERNELS, blanked(every_call(dtype)[name]), torch.device("cpu")) is None
