"""Arithmetic that is right both compiled and interpreted.

Kernels compute in fp32 and touch narrower types only here. Triton's interpreter (TRITON_INTERPRET=1) holds bf16 as
raw 16-bit integers: it truncates where hardware rounds, and its dot multiplies the integers. Compiled, these helpers
are an instruction or two, some of which Triton has no words for: those are PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bnrestructure.kernels.rounding import GRADIENT_FACTOR

__all__ = [
    "INTERPRETED", "beside", "dithered", "exponential", "in_units", "is_swapped", "multiply", "multiply_rows", "offset",
    "reciprocal", "representable", "restored_gradient", "rounded", "rounded_gradient",
]  # fmt: skip

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


#: Two numbers at a time: one alone is converted by another instruction on sm_90 (F2F), that of the unit that makes the exponentials.
_PAIR_OF_BF16 = tl.constexpr(
    "{ .reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000; }"
)
_PAIR_OF_FP16 = tl.constexpr(
    "{ .reg .b32 pair; .reg .b16 low, high; cvt.rn.f16x2.f32 pair, $3, $2; "
    "mov.b32 {low, high}, pair; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
)


@triton.jit
def representable(x, dtype: tl.constexpr):
    """fp32 ``x`` as :func:`rounded` to ``dtype``, still in fp32: to compute with what is stored."""
    if INTERPRETED or dtype == tl.float32:
        x = rounded(x, dtype).to(tl.float32)
    elif dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(_PAIR_OF_BF16, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        x = tl.inline_asm_elementwise(_PAIR_OF_FP16, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    return x


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(x):
    """e^x of fp32 as the hardware's 2^x gives it (2 ulp, and what rounding ``x * log2(e)`` does): 0 for subnormal results."""
    if INTERPRETED:
        e = tl.exp(x)
    else:
        e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * _LOG2_E], dtype=tl.float32, is_pure=True, pack=1)
    return e


@triton.jit
def reciprocal(x):
    """1 / x of fp32 to 1 ulp, for what is neither subnormal nor beyond 2^126."""
    if INTERPRETED:
        r = 1.0 / x
    else:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return r


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
def multiply(a, b, total, PRECISION: tl.constexpr, COMPUTED: tl.constexpr, PART: tl.constexpr):
    """``total + a @ b`` with fp32 accumulation. PRECISION is what fp32 operands are multiplied in: ieee or tf32.

    COMPUTED: ``a`` is not what a load brought. On sm_90 (PART, see launch.py) the product then reads ``a`` from registers, and Triton lets
    it run on while the next turn of the loop computes into them (triton-lang/triton#9433). A use of the result, here an empty one, makes
    it wait. The loads of the next turns are under way meanwhile, as before.
    """
    if INTERPRETED:  # widening is exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    total = tl.dot(a, b, total, input_precision=PRECISION)
    if PART == 90 and COMPUTED:
        total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1)
    return total


@triton.jit
def beside(x, g):
    """fp32 ``x`` where ``g``, of the same shape in fp32, is: the threads that hold an element of the one hold it of the other.

    Triton lets a product's results stay where the tensor cores put them, and what was loaded where it was loaded, and meets half-way, with
    masks and sums in bytes. An instruction that takes both, and does nothing, decides it.
    """
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, g], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.constexpr_function
def is_swapped(columns):
    """Whether a tile of so many channels by its pixels is multiplied as channels by pixels: see :func:`multiply_rows`."""
    return columns >= 64


@triton.jit
def multiply_rows(a, w, total, PRECISION: tl.constexpr, COMPUTED: tl.constexpr, PART: tl.constexpr, SWAPPED: tl.constexpr):
    """``total + a @ w.T`` of a [rows, depth] and w [columns, depth]; SWAPPED: its transpose, ``total + w @ a.T``.

    Swapped, each thread of a tensor core's tile has few channels and many pixels: what is summed over pixels is summed within threads. And
    what was computed goes to the product through shared memory, not through registers. sm_90's products need 64 rows of the left operand.
    """
    if SWAPPED:
        total = multiply(w, tl.trans(a), total, PRECISION, COMPUTED, PART)
    else:
        total = multiply(a, tl.trans(w), total, PRECISION, COMPUTED, PART)
    return total


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
