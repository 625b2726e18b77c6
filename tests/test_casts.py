"""Weights that a program casts together: the values of the moment when they are read, whatever happened to them since they were cast."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bnrestructure.core.edges import ConvGeometry
from bnrestructure.ops import casts
from bnrestructure.ops.casts import Casts, cast_ahead

BF16 = torch.bfloat16


@pytest.fixture
def foreach(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each call has cast together."""
    sizes: list[int] = []
    copy = torch._foreach_copy_

    def noted(values: list[Tensor], weights: list[Tensor]) -> None:
        sizes.append(len(weights))
        copy(values, weights)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    return sizes


def weights() -> list[nn.Parameter]:
    last = torch.channels_last
    return [nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=last)), nn.Parameter(torch.randn(5, 4, 1, 1))]


def cast(weight: Tensor, dtype: torch.dtype = BF16, *, by_tap: bool = False) -> Tensor:
    """As a convolution on a GPU would have it."""
    return casts._state.run.cast(weight, casts._Form(dtype, by_tap))


def right(found: Tensor, weight: Tensor) -> bool:
    exact = weight.detach().to(BF16)
    return torch.equal(found, exact) and found.is_contiguous(memory_format=torch.channels_last) and not found.requires_grad


def test_the_second_run_casts_together_what_the_first_one_asked_for(foreach: list[int]) -> None:
    given, known = weights(), Casts()
    for _ in range(3):
        with cast_ahead(known):
            assert all(right(cast(w), w) for w in (*given, given[0]))  # one of them twice
        for w in given:
            w.data.mul_(2.0)
    assert foreach == [2, 2]


def test_a_weight_that_is_written_to_in_a_run_is_cast_anew() -> None:
    (given, _), known = weights(), Casts()
    for _ in range(2):
        with cast_ahead(known):
            assert right(cast(given), given)
            with torch.no_grad():
                given.add_(1.0)
            assert right(cast(given), given)


def test_weights_that_are_gone_or_others_now(foreach: list[int]) -> None:
    given, known = weights(), Casts()
    with cast_ahead(known):
        assert all(right(cast(w), w) for w in given)
    given[0] = nn.Parameter(given[0].detach().clone() * 3)
    gc.collect()
    with cast_ahead(known):
        assert all(right(cast(w), w) for w in given)
    assert foreach == [1]


def test_what_a_run_does_not_ask_for_is_not_cast_by_the_next_but_one(foreach: list[int]) -> None:
    given, known = weights(), Casts()
    for asked in (given, given[:1], given[:1]):
        with cast_ahead(known):
            assert all(right(cast(w), w) for w in asked)
    assert foreach == [2, 1]


def test_another_dtype_is_another_cast() -> None:
    (given, _), known = weights(), Casts()
    with cast_ahead(known):
        cast(given, BF16)
    with cast_ahead(known):
        assert torch.equal(cast(given, torch.float16), given.detach().half())


def test_depthwise_kernels_read_theirs_tap_by_tap(foreach: list[int]) -> None:
    given, known = nn.Parameter(torch.randn(6, 1, 3, 3)), Casts()
    for _ in range(2):
        with cast_ahead(known):
            found = cast(given, by_tap=True)
            assert torch.equal(found, given.detach().to(BF16))
            assert found.permute(2, 3, 1, 0).is_contiguous()
            assert right(cast(given), given)
    assert foreach == [1, 1]


def test_a_weight_that_is_computed_is_no_weight_to_remember(foreach: list[int]) -> None:
    given, known = weights(), Casts()
    for _ in range(2):
        with cast_ahead(known):
            computed = given[0] * 2
            assert right(cast(computed), computed)
    assert foreach == []


def _fail(known: Casts, weight: Tensor) -> None:
    with cast_ahead(known):
        cast(weight)
        raise ZeroDivisionError


def test_blocks_may_be_nested_and_end_with_an_error() -> None:
    given, outer, inner = weights(), Casts(), Casts()
    for _ in range(2):
        with cast_ahead(outer):
            assert right(cast(given[0]), given[0])
            with pytest.raises(ZeroDivisionError):
                _fail(inner, given[1])
            with cast_ahead(inner):
                assert right(cast(given[1]), given[1])
            assert right(cast(given[0]), given[0])
    assert casts._state.run is None
    assert len(outer.wanted) == 1


def test_kernels_of_the_cpu_cast_for_themselves() -> None:
    geometry = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
    with cast_ahead(known := Casts()):
        assert casts.cast_weight(weights()[0], BF16, geometry) is None
    assert known.wanted == []


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert getattr(casts._state, "run", None) is None
