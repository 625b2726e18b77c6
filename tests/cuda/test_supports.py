"""What the CUDA kernels say they can run, and that asking needs neither a GPU nor Triton."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, PoolGeometry, Transform
from bnrestructure.kernels import reference
from bnrestructure.kernels.calls import ConvBackward, ConvForward, FinalizeBackward, FinalizeForward, MaxPoolForward
from bnrestructure.kernels.cuda import KERNELS, CudaKernels
from bnrestructure.kernels.cuda import limits as rules
from bnrestructure.kernels.unmerged import Unmerged

GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


def run_python(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_importing_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it is an error from here on
import bnrestructure, torch
from bnrestructure.kernels import cuda, registry
from bnrestructure.kernels.calls import StatisticsForward
assert registry.implementation("cuda") is cuda.KERNELS
print(cuda.KERNELS.supports(StatisticsForward(torch.empty(1, 1, 1, 1))), "|", cuda.KERNELS.unavailable_reason() is not None)
"""
    assert run_python(code) == "None | True"


def test_asking_does_not_import_triton() -> None:
    code = (
        "import sys; from bnrestructure.kernels.cuda import KERNELS; KERNELS.unavailable_reason(); print('triton' in sys.modules)"
    )
    assert run_python(code) == "False"


def reason_with(
    monkeypatch: pytest.MonkeyPatch, *, available: bool, triton: bool, capability: tuple[int, int]
) -> str | None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(rules.util, "find_spec", lambda name: object() if triton else None)
    return rules.unavailable_reason.__wrapped__()


def test_unavailable_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason_with(monkeypatch, available=False, triton=True, capability=(9, 0)) == "no CUDA device"
    assert reason_with(monkeypatch, available=True, triton=False, capability=(9, 0)) == "triton is not installed"
    assert "7.5" in str(reason_with(monkeypatch, available=True, triton=True, capability=(7, 5)))
    assert reason_with(monkeypatch, available=True, triton=True, capability=(8, 0)) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in str(reason_with(monkeypatch, available=True, triton=True, capability=(9, 0)))


def pixels(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 4, 3, 3)) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_reason(x: Tensor, transform: Transform | None = None, *, dtype: torch.dtype = torch.float32) -> str | None:
    weight = torch.empty(5, 4, 3, 3, dtype=torch.float32, device="meta")
    return KERNELS.supports(ConvForward(x, transform or Transform(), weight, None, GEOMETRY, dtype=dtype))


def test_what_a_convolution_is_refused_for() -> None:
    assert forward_reason(pixels()) is None
    assert forward_reason(pixels(torch.float16), dtype=torch.float16) is None
    assert forward_reason(pixels().permute(0, 1, 3, 2)) is None  # copied
    assert "float64" in str(forward_reason(pixels(torch.float64), dtype=torch.float64))
    assert "dimensions" in str(forward_reason(pixels(shape=(2, 4, 3))))
    assert "empty" in str(forward_reason(pixels(shape=(0, 4, 3, 3))))
    assert "unknown activation" in str(forward_reason(pixels(), Transform(act="tanh")))
    assert "2^31" in str(forward_reason(pixels(shape=(2**15, 4, 2**9, 2**8))))
    assert "negative bit" in str(forward_reason(torch._neg_view(torch.zeros(2, 4, 3, 3))))
    assert "negative bit" in str(forward_reason(pixels(), Transform(*[torch._neg_view(torch.zeros(4))] * 3)))


def test_a_gate_before_a_strided_convolution_is_refused_in_backward() -> None:
    x, weight = pixels(), torch.empty(5, 4, 3, 3, device="meta")
    gate = Transform(gate=torch.empty(2, 4, device="meta"))
    for stride, refused in ((1, False), (2, True)):
        args = (
            pixels(shape=(2, 5, 4 - stride, 4 - stride)),
            BackwardEdge(),
            x,
            gate,
            weight,
            ConvGeometry((stride,) * 2, (1, 1), (1, 1), 1),
        )
        reason = KERNELS.supports(ConvBackward(*args, dtype=torch.float32))
        assert (reason is not None) == refused


def test_finalize() -> None:
    v = torch.empty(3, device="meta")
    call = FinalizeForward(v, v, 10, v, v, v, v, 0.1, 1e-5)

    def reason(**changes: Any) -> str | None:
        return KERNELS.supports(replace(call, **changes))

    assert reason() is None
    assert reason(weight=v.half()) is None
    assert "float64" in str(reason(weight=v.double()))
    assert "contiguous" in str(reason(running_mean=torch.empty(6, device="meta")[::2]))
    assert reason(momentum=None, batches=torch.empty((), dtype=torch.int64, device="meta")) is None
    assert "fp32" in str(reason(mean=v.double()))
    assert "channels" in str(reason(bias=torch.empty(4, device="meta")))
    two, five = torch.empty(2, device="meta"), torch.empty(5, device="meta")
    in_parts = {"behind": (two, two), "weight": five, "bias": five, "running_mean": five, "running_var": five}
    assert reason(**in_parts) is None
    assert "channels" in str(reason(behind=(two, two)))
    assert "fp32" in str(reason(**in_parts | {"behind": (two.double(), two)}))
    assert reason(**in_parts | {"behind": (two, v)}) is not None
    assert reason(unmerged=Unmerged(torch.empty(3, 7, 3, device="meta"), 50, 8)) is None
    assert reason(unmerged=Unmerged(torch.empty(3, 7, 3, device="meta"), counts=torch.empty(6, device="meta"))) is not None
    assert reason(unmerged=Unmerged(torch.empty(3, 7, 4, device="meta"), 50, 8)) is not None
    assert reason(unmerged=Unmerged(torch.empty(3, 9999, 3, device="meta"), 79992, 8)) is not None
    assert reason(**in_parts | {"unmerged": Unmerged(torch.empty(3, 7, 2, device="meta"), 50, 8)}) is None
    backward = FinalizeBackward(v, v, v, v, v, v)
    assert KERNELS.supports(backward) is None
    assert KERNELS.supports(replace(backward, dvar=two)) is not None


def test_what_a_max_pool_is_refused_for() -> None:
    def reason(kernel: tuple[int, int], padding: tuple[int, int] = (0, 0)) -> str | None:
        geometry = PoolGeometry(kernel, (2, 2), padding, False)
        return KERNELS.supports(MaxPoolForward(pixels(), Transform(), geometry, dtype=torch.float32))

    assert reason((3, 3), (1, 1)) is None
    assert "255" in str(reason((16, 16)))
    assert "padding" in str(reason((3, 3), (2, 2)))


def test_every_reference_kernel_has_a_rule_and_a_cuda_kernel() -> None:
    pytest.importorskip("triton")
    assert set(rules._RULES) == set(reference.RUN) == {*KERNELS._sweeps, ConvForward, ConvBackward}


def test_they_are_proved_before_they_are_used_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnrestructure.kernels import registry
    from bnrestructure.kernels.proof.prover import Proved

    monkeypatch.setattr(CudaKernels, "unavailable_reason", lambda self: None)
    registry.forget_answers()
    try:
        for backend in ("auto", "cuda"):
            assert isinstance(registry._usable(backend, "cuda", 4), Proved)
        assert registry.proving("reference", "cuda") is None
        assert registry.proving("auto", "cpu") is None
    finally:
        registry.forget_answers()
