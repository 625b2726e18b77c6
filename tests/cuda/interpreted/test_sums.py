"""Sums of tiles' sums, interpreted: two by one launch, the rest by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnrestructure.kernels.cuda import sums as module
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.sums import Sums

#: [outer, count, inner]: one tile, more than are added at a time, more columns than one program has, more tiles than one program reads.
PARTIALS = ((1, 1, 3), (2, 5, 40), (3, 513, 9), (1, 600, 70), (2, 3, 5000), (2, tiles.READ_BY_ONE + 1, 4))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is launched, while it is."""
    seen: list[object] = []
    launch = module.launch

    def noted(kernel: object, *arguments: object, **options: object) -> None:
        seen.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(module, "launch", noted)
    return seen


def close(found: Tensor, partial: Tensor) -> None:
    exact = partial.double().sum(1)
    assert found.shape == exact.shape
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5 * partial.shape[1] ** 0.5)


@pytest.mark.parametrize("first", PARTIALS, ids=str)
@pytest.mark.parametrize("second", PARTIALS, ids=str)
def test_two_by_one_launch(first: tuple[int, ...], second: tuple[int, ...], launches: list[object]) -> None:
    due, partials = Sums(), [torch.randn(first), torch.randn(second)]
    found = [due.of(partial) for partial in partials]
    due.finish()
    for total, partial in zip(found, partials, strict=True):
        close(total, partial)
    assert len(launches) == (max(first[1], second[1]) <= tiles.READ_BY_ONE)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number(count: int, launches: list[object]) -> None:
    due, partials = Sums(), [torch.randn(2, 3 + i, 10) for i in range(count)]
    found = [due.of(partial) for partial in partials]
    due.finish()
    for total, partial in zip(found, partials, strict=True):
        close(total, partial)
    assert len(launches) == count // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("beside", [True, False])
def test_a_weight_gradient_of_a_product_of_its_own(
    beside: bool, layout: torch.memory_format, dtype: torch.dtype, launches: list[object]
) -> None:
    """Without the factor that it was computed with, in the weight's dtype and strides, and by the launch that adds up other sums."""
    weight = torch.randn(6, 5, 3, 3).to(dtype).contiguous(memory_format=layout)
    found, other = torch.randn(6, 5, 3, 3).to(torch.bfloat16).contiguous(memory_format=torch.channels_last), torch.randn(2, 7, 5)
    due = Sums()
    gradient = due.restored(found, weight, 256.0)
    total = due.of(other) if beside else None
    due.finish()
    assert total is None or close(total, other) is None
    assert (gradient.shape, gradient.dtype, gradient.stride()) == (weight.shape, dtype, weight.stride())
    assert torch.equal(gradient, (found.double() / 256).to(dtype))
    assert len(launches) == (beside and dtype is torch.float32 and layout is torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_weight_gradients(kernel: int, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """In the weight's own shape, dtype and strides."""
    weight = torch.randn(6, 5, kernel, kernel).to(dtype).contiguous(memory_format=layout)
    partial, other = torch.randn(4, 6, kernel, kernel, 5), torch.randn(2, 7, 5)
    due = Sums()
    gradient, total = due.weight_gradient(partial, weight), due.of(other)
    due.finish()
    close(total, other)
    assert (gradient.shape, gradient.dtype, gradient.stride()) == (weight.shape, dtype, weight.stride())
    exact = partial.double().sum(0).permute(0, 3, 1, 2)
    assert torch.allclose(gradient.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
