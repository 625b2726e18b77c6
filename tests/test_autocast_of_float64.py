"""Autocast leaves float64 alone, as eager does."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import build, input_for

import bnrestructure


@pytest.mark.parametrize("name", ["chain", "residual", "squeeze_excite", "dense"])
def test_float64_stays_float64(name: str) -> None:
    model, x = build(name), input_for(name)
    restructured = bnrestructure.restructure(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(x), restructured(x)
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    expected.square().sum().backward()
    found.square().sum().backward()
    for one, other in zip(model.parameters(), restructured.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-8, atol=1e-8)
