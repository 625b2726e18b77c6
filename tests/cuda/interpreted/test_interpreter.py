"""What conftest.py changed in Triton's interpreter for speed finds what it found."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _products(out_ptr, factor, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, (place + 1) * factor)


@triton.jit
def _sums(out_ptr, term, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, place + term)


@triton.jit
def _differences(out_ptr, term, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, -place - term)


@pytest.mark.parametrize(
    ("kernel", "most"), [(_products, (2**31 - 1) // 16), (_sums, 2**31 - 16), (_differences, 2**31 - 15)], ids=["mul", "add", "sub"]
)
def test_integers_that_overflow_are_found(kernel, most) -> None:  # type: ignore[no-untyped-def]
    out = torch.zeros(16, dtype=torch.int32)
    kernel[(1,)](out, most, BLOCK=16)
    with pytest.raises(InterpreterError, match="int32 overflow"):
        kernel[(1,)](out, most + 2, BLOCK=16)
