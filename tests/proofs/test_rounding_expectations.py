"""Rounding that keeps what batch norm subtracts: what ``dithered`` promises on average, by enumeration.

That of the gradient factor is in tests/kernels/test_rounding.py; that it leaves no trace in exact arithmetic, in test_nodes.py.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from prove import planted

from bnrestructure.kernels import rounding

NARROW = (torch.bfloat16, torch.float16)


def unit(dtype: torch.dtype) -> float:
    """The distance of neighbours between 1 and 2."""
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("count", [1, 2, 8, 32])
def test_an_even_spread_keeps_any_value(count: int) -> None:
    """Rounding t + (k + 1/2) / n - 1/2, averaged over k < n, is t to within 1 / 2n: exactly, for every t of a fine grid."""
    for t in (Fraction(i, 24 * count) for i in range(24 * count)):
        rounded = [round(t + Fraction(2 * k + 1, 2 * count) - Fraction(1, 2)) for k in range(count)]
        assert abs(sum(rounded, Fraction(0)) / count - t) <= Fraction(1, 2 * count)


def spread_error(dtype: torch.dtype, pixels: int) -> float:
    """How far the mean of ``dithered`` is from a value that is no power of two, at the worst, in units."""
    values = 1.01 + torch.linspace(0.0, 0.98, 101, dtype=torch.float32)
    kept = rounding.dithered(values.view(1, -1, 1).expand(1, -1, pixels).contiguous(), dtype).double().mean(2)
    return float(((kept - values).abs() / unit(dtype)).max())


@pytest.mark.parametrize("dtype", NARROW)
def test_dithered_keeps_values_on_average(dtype: torch.dtype) -> None:
    """Over a period of 65536 pixels to what float32 can tell, over n of them to log2(n) / n."""
    assert spread_error(dtype, 65536) < 2e-4
    for pixels in (8, 49, 196, 3136):
        assert spread_error(dtype, pixels) < math.log2(pixels) / pixels


def test_a_power_of_two_is_kept_to_an_eighth_of_a_unit() -> None:
    """Below it the representable numbers lie closer, so that half of the pattern is rounded to a finer grid: one mantissa of 128."""
    kept = rounding.dithered(torch.ones(1, 1, 65536), torch.bfloat16).double().mean().item()
    assert (1 - kept) / unit(torch.bfloat16) == pytest.approx(1 / 8, abs=1e-3)


def test_where_there_is_nothing_to_lose_nothing_is_multiplied() -> None:
    for dtype in (torch.float32, *NARROW):
        assert rounding.gradient_factor(False, dtype, torch.float32) == 1
        assert rounding.gradient_factor(True, dtype, torch.float32) == (1 if dtype == torch.float32 else rounding.GRADIENT_FACTOR)


def test_plain_rounding_is_caught() -> None:
    with planted("dithered", lambda _: lambda value, dtype: value.to(dtype)), pytest.raises(AssertionError):
        test_dithered_keeps_values_on_average(torch.bfloat16)
