"""The per-channel step of a batch norm against the reference in fp64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cpu_checks import assert_as_good, to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import FinalizeBackward, FinalizeForward, Kernels
from bnrestructure.kernels.cpu import KERNELS
from bnrestructure.kernels.reference import REFERENCE

pytestmark = needs_kernels

DTYPES = (torch.float32, torch.bfloat16)


def statistics(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(channels) * 3, torch.rand(channels) * 10 + 1e-3


@pytest.mark.parametrize("channels", [1, 7, 64, 1000])
@pytest.mark.parametrize(("parameter_dtype", "running_dtype"), list(product((None, *DTYPES), (None, *DTYPES))))
@pytest.mark.parametrize("count", [2, 12544, torch.tensor(100.0)])
def test_forward(
    channels: int, parameter_dtype: torch.dtype | None, running_dtype: torch.dtype | None, count: int | Tensor
) -> None:
    mean, var = statistics(channels)
    weight, bias = (None, None) if parameter_dtype is None else torch.randn(2, channels).to(parameter_dtype).unbind()
    running = (None, None) if running_dtype is None else torch.rand(2, channels).to(running_dtype).unbind()
    buffers, results = [], []
    for module, convert in ((KERNELS, lambda v: v), (REFERENCE, lambda v: v), (REFERENCE, to_double)):
        own = [None if r is None else convert(r.clone()) for r in running]
        arguments = [convert(v) for v in (mean, var, count, weight, bias)]
        results.append(module.run(FinalizeForward(*arguments, *own, 0.1, 1e-5)))
        buffers.append(tuple(own))
    assert_as_good("results", *results)
    assert_as_good("running statistics", *buffers)


@pytest.mark.parametrize("module", [KERNELS, REFERENCE], ids=["cpu", "reference"])
def test_running_statistics_are_updated_in_place_and_alone(module: Kernels) -> None:
    mean, var = statistics(9)
    running_mean = torch.zeros(9)
    module.run(FinalizeForward(mean, var, 50, None, None, running_mean, None, 1.0, 1e-5))
    assert torch.equal(running_mean, mean)
    assert running_mean._version == 0  # autograd does not count this write, as it does not count PyTorch's own batch norm's


@pytest.mark.parametrize("module", [KERNELS, REFERENCE], ids=["cpu", "reference"])
def test_the_batch_is_counted_and_without_a_momentum_all_have_equal_shares(module: Kernels) -> None:
    mean, var = statistics(9)
    running_mean, batches = torch.ones(9), torch.tensor(3)
    module.run(FinalizeForward(mean, var, 50, None, None, running_mean, None, None, 1e-5, batches))
    assert batches == 4
    torch.testing.assert_close(running_mean, 0.75 + mean / 4)
    module.run(FinalizeForward(mean, var, 50, None, None, running_mean, None, 0.0, 1e-5, batches))
    assert batches == 5
    torch.testing.assert_close(running_mean, 0.75 + mean / 4)


@pytest.mark.parametrize("channels", [1, 7, 1000])
@pytest.mark.parametrize("handed_on", [(), ("dmean",), ("dvar",), ("dmean", "dvar")], ids=str)
def test_backward(channels: int, handed_on: tuple[str, ...]) -> None:
    vectors = torch.randn(channels), torch.randn(channels), torch.rand(channels) * 30, torch.randn(channels)
    others = {name: torch.randn(channels) for name in handed_on}
    call = FinalizeBackward(*vectors, **others)
    truth = REFERENCE.run(FinalizeBackward(*map(to_double, vectors), **{name: to_double(v) for name, v in others.items()}))
    assert_as_good("gradients", KERNELS.run(call), REFERENCE.run(call), truth)


@pytest.mark.parametrize("module", [KERNELS, REFERENCE], ids=["cpu", "reference"])
def test_a_concat_is_made_on_the_way(module: Kernels) -> None:
    mean, var = statistics(9)
    weight, bias = torch.randn(2, 9).unbind()
    buffers = [torch.zeros(9), torch.zeros(9)]
    found = module.run(FinalizeForward(mean[:2], var[:2], 50, weight, bias, buffers[0], None, 0.5, 1e-5, None, (mean[2:], var[2:])))
    whole = module.run(FinalizeForward(mean, var, 50, weight, bias, buffers[1], None, 0.5, 1e-5))
    for name, ours, theirs in zip(found._fields, found, whole, strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(*buffers)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_call_that_is_refused_has_counted_nothing(momentum: float | None) -> None:
    mean, var = statistics(4)
    for running in (torch.zeros(8)[::2], torch.zeros(4, dtype=torch.float16)):
        batches = torch.tensor(3)
        with pytest.raises(UnsupportedCallError):
            KERNELS.run(FinalizeForward(mean, var, 8, None, None, running, None, momentum, 1e-5, batches))
        assert batches == 3


def test_strided_vectors() -> None:
    mean, var = (torch.rand(20)[::2] for _ in range(2))
    weight = torch.rand(30)[::3]
    result = KERNELS.run(FinalizeForward(mean, var, 8, weight, None, None, None, 0.1, 1e-5))
    mean, var, weight = mean.contiguous(), var.contiguous(), weight.contiguous()
    expected = KERNELS.run(FinalizeForward(mean, var, 8, weight, None, None, None, 0.1, 1e-5))
    assert all(map(torch.equal, result, expected))


def test_supports_gives_reasons() -> None:
    mean, var = statistics(4)
    assert KERNELS.supports(FinalizeForward(mean, var, 8, mean, mean, mean, var, 0.1, 1e-5)) is None
    half = mean.half()
    strided = torch.rand(8)[::2]
    assert KERNELS.supports(FinalizeForward(mean, var, 8, half, None, None, None, 0.1, 1e-5))
    assert KERNELS.supports(FinalizeForward(mean, var, 8, None, None, strided, None, 0.1, 1e-5))
    assert KERNELS.supports(FinalizeForward(mean.double(), var.double(), 8, None, None, None, None, 0.1, 1e-5))
    assert KERNELS.supports(FinalizeBackward(mean, mean, var.double(), mean))
    assert KERNELS.supports(FinalizeBackward(mean, mean, var, mean)) is None
    assert KERNELS.supports(FinalizeForward(mean, var, 8, None, None, None, None, 0.1, 1e-5, None, (mean, var))) is None
    assert KERNELS.supports(FinalizeForward(mean, var, 8, None, None, None, None, 0.1, 1e-5, None, (mean, var.double())))
