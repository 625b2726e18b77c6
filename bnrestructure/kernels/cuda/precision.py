"""Arithmetic that is right both compiled and interpreted.

Kernels compute in fp32 and touch narrower types only here. Triton's interpreter (TRITON_INTERPRET=1) holds bf16 as
raw 16-bit integers: it truncates where hardware rounds, and its dot multiplies the integers. Compiled, these helpers
are one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "multiply", "offset", "rounded"]

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


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` with fp32 accumulation. PRECISION is what fp32 operands are multiplied in: ieee or tf32."""
    if INTERPRETED:  # widening is exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def offset(pixel, pitch, WIDE: tl.constexpr):
    """Elements before ``pixel`` in a tensor of this pitch; in 64 bits where the tensor reaches beyond 2^31 elements."""
    if WIDE:
        pixel = pixel.to(tl.int64)
    return pixel * pitch
