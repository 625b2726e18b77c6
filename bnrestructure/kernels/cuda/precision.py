"""Arithmetic that is right both compiled and interpreted.

Kernels compute in fp32 and touch narrower types only here. Triton's interpreter (TRITON_INTERPRET=1) holds bf16 as
raw 16-bit integers: it truncates where hardware rounds, and its dot multiplies the integers. Compiled, these helpers
are one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bnrestructure.kernels.rounding import GRADIENT_FACTOR

__all__ = ["INTERPRETED", "dithered", "in_units", "multiply", "offset", "restored_gradient", "rounded", "rounded_gradient"]

#: Fixed when triton is imported: one mode per process.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded to ``dtype``, to nearest, ties to even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


_FACTOR = tl.constexpr(GRADIENT_FACTOR)


@triton.jit
def rounded_gradient(d, a_ptr, dtype: tl.constexpr):
    """dY rounded for a product, off the grid that P lay on where it has corrections (``a_ptr``): kernels/rounding.py."""
    if a_ptr is not None and dtype != tl.float32:
        d *= _FACTOR
    return rounded(d, dtype)


@triton.jit
def restored_gradient(total, a_ptr, dtype: tl.constexpr):
    """A product of :func:`rounded_gradient`, in its true size."""
    if a_ptr is not None and dtype != tl.float32:
        total *= 1.0 / _FACTOR
    return total


@triton.jit
def dithered(x, pixel, dtype: tl.constexpr):
    """fp32 ``x`` rounded to ``dtype`` so that it is kept on average over some pixels: ``dithered`` of kernels/rounding.py."""
    if dtype != tl.float32:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = ((pixel * 40503) & 0xFFFF).to(tl.float32) - 32767.5
        if dtype == tl.bfloat16:
            moved = tl.fma(power, step * 2.0**-23, x)
        else:
            moved = tl.fma(tl.maximum(power, 2.0**-14), step * 2.0**-26, x)
        x = tl.where((tl.abs(x) < float("inf")) & (x != 0.0), moved, x)
    return rounded(x, dtype)


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` with fp32 accumulation. PRECISION is what fp32 operands are multiplied in: ieee or tf32."""
    if INTERPRETED:  # widening is exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def in_units(n, UNIT: tl.constexpr):
    """``n``, a multiple of UNIT, in a form that tells the compiler so: one load can bring 8 numbers of 16 bits."""
    if UNIT > 1:
        n = n // UNIT * UNIT
    return n


@triton.jit
def offset(pixel, pitch, WIDE: tl.constexpr):
    """Elements before ``pixel`` in a tensor of this pitch; in 64 bits where the tensor reaches beyond 2^31 elements."""
    if WIDE:
        pixel = pixel.to(tl.int64)
    return pixel * pitch
