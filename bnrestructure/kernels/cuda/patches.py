"""Depthwise convolutions by patches: a lane has some neighbouring pixels to make, so that what several of them read is read once.

Each pixel that a depthwise convolution reads counts for every tap, and a fused one has a transform to apply to it first: with a lane to
each output pixel a 3x3 kernel transforms everything nine times, and that, not memory, is what it takes. In a patch of 2 x 4 outputs it is
three times. Which of a patch's pixels and taps meet is known at compile time; the functions here say so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.activation import activate, pre_activation
from bnrestructure.kernels.cuda.precision import offset, representable

__all__ = [
    "first_read", "is_any_read", "last_read", "patches_in", "tap_at", "transformed_pixel",
    "with_added_product", "with_added_tap", "with_last",
]  # fmt: skip


def patches_in(size: tuple[int, ...], height: int, width: int) -> int:
    """How many patches cover an image of this size."""
    return tiles.cdiv(size[0], height) * tiles.cdiv(size[1], width)


@triton.constexpr_function
def tap_at(distance, dilation, kernel):
    """The tap that lies ``distance`` pixels behind a kernel's first one, along one dimension; -1 where none does."""
    return distance // dilation if distance % dilation == 0 and 0 <= distance // dilation < kernel else -1


@triton.constexpr_function
def is_any_read(place, size, stride, kernel, dilation):
    """Whether a row of ``size`` outputs reads the input pixel at ``place``, counted from the first one that it reads."""
    return any(
        (place - output * stride) % dilation == 0 and 0 <= place - output * stride < kernel * dilation for output in range(size)
    )


@triton.constexpr_function
def first_read(stride, padding, kernel, dilation):
    """The first output that reads any input pixel from number 0 on, a multiple of the stride; outputs before number 0 are negative."""
    return -((dilation * (kernel - 1) - padding) // stride)


@triton.constexpr_function
def last_read(size, stride, padding):
    """The last output that reads any of the input pixels 0 to ``size`` - 1."""
    return (size - 1 + padding) // stride


@triton.jit
def transformed_pixel(
    x_ptr, mean_ptr, scale_ptr, beta_ptr, gate_ptr, x_pitch, n, h, w, channel, channels, lanes, valid, H, W,
    ACT: tl.constexpr, SLOPE: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the convolution multiplies of pixel (h, w) of image n, each [rows], as a block [rows, channels] of fp32 that DTYPE can hold: 0
    outside the image, where alone PADDED lets h and w be negative.
    """
    meets = lanes & (h < H) & (w < W)
    if PADDED:
        meets = meets & (h >= 0) & (w >= 0)
    inside = meets[:, None] & valid[None, :]
    pixel = ((n * H + h) * W + w)[:, None]
    x = tl.load(x_ptr + offset(pixel, x_pitch, WIDE) + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    u = pre_activation(x, mean_ptr, scale_ptr, beta_ptr, channel[None, :], valid[None, :])
    z = activate(u, ACT, SLOPE)
    if gate_ptr is not None:
        z *= tl.load(gate_ptr + n[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    return representable(tl.where(inside, z, 0.0), DTYPE)


@triton.jit
def with_added_product(totals, at: tl.constexpr, a, b):
    """The tuple ``totals`` with ``a * b`` added to what stands at ``at``."""
    return totals[:at] + (tl.fma(a, b, totals[at]),) + totals[at + 1 :]  # noqa: RUF005 Triton does not unpack


@triton.jit
def with_added_tap(totals, at: tl.constexpr, block, w_ptr, tap, channel, channels, valid):
    """The same with the product of ``block`` and the weights [channels] of tap number ``tap``."""
    w = tl.load(w_ptr + tap * channels + channel, mask=valid, other=0.0).to(tl.float32)
    return with_added_product(totals, at, block, w[None, :])


@triton.jit
def with_last(blocks, block):
    """The tuple ``blocks`` and one more."""
    return blocks + (block,)  # noqa: RUF005 Triton does not unpack
