"""Rounding gradients to bfloat16 or float16 without losing what batch norm subtracts from them.

``dY = P + a * (y - mean) + b``: the two corrections make dY's sums over the mini-batch zero. Every one of them is small beside P, about
|P| / sqrt(M) over M values; below half a unit in P's last place. P comes out of memory, already rounded. Rounded to the same dtype again,
``P + small`` is P: the corrections would be gone from every value, and with them the zero sums, on which the gradients of the layers before
depend (of beta and of biases above all, which may be nothing but this sum). Eager PyTorch escapes by chance: it multiplies by ``scale``
before it rounds, so its values lie between the representable ones and each correction moves a few of them to the next.

So values here must not lie on representable ones either when they are rounded:

- a convolution's backward multiplies dY by :data:`GRADIENT_FACTOR` before it rounds it for the matrix products, and divides their results
  by it (:func:`gradient_factor`);
- a sweep that stores ``P + correction`` adds a pattern spread evenly over one unit in the last place first (:func:`dithered`);
- so does the backward of a global average, whose P is the same for all pixels of an image and would be rounded alike in all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnrestructure.core.edges import Transform

__all__ = ["GRADIENT_FACTOR", "dithered", "gradient_factor", "narrowed", "restored"]

#: Irrational, so that the multiples of no grid fall on the grid; 1 / sqrt(2) keeps small corrections best among the simple ones: on
#: average over bfloat16 mantissas a correction of any size is kept to within 0.015 units in the last place (with a factor of 1: 0.43).
GRADIENT_FACTOR = 0.5**0.5

# Row i of the pattern is frac(i * 40503 / 65536), near the golden ratio's multiples: any run of rows is evenly spread.
_STEP, _PERIOD = 40503, 65536


def gradient_factor(corrected: bool, dtype: torch.dtype, exact: torch.dtype) -> float:
    """What to multiply dY, computed in ``exact``, by before it is rounded to ``dtype``: 1 where it has no corrections to lose."""
    return GRADIENT_FACTOR if corrected and dtype != exact else 1.0


def restored(product: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """A product of dY times ``factor``, in its true size and in ``dtype``; nothing is computed where the factor is 1."""
    return product.to(dtype) if factor == 1 else (product.float() / factor).to(dtype)


def dithered(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` [N, C, *spatial] in ``dtype``, rounded so that it is kept on average over a few pixels of each channel."""
    if dtype == value.dtype:
        return value
    n = value.shape[0]
    pixels = torch.arange(value.numel() // max(value.shape[1], 1), device=value.device)
    offset = ((pixels * _STEP % _PERIOD).to(value.dtype) + 0.5) / _PERIOD - 0.5
    limits = torch.finfo(dtype)
    exponent = torch.frexp(value).exponent  # |value| < 2**exponent
    unit = torch.ldexp(torch.full_like(value, limits.eps), exponent - 1)
    moved = value + unit.clamp(min=limits.tiny * limits.eps) * offset.view(n, 1, *value.shape[2:])
    return torch.where(torch.isfinite(value) & (value != 0), moved, value).to(dtype)


def narrowed(x: Tensor, transform: Transform, dtype: torch.dtype) -> str | None:
    """Why kernels that round x to ``dtype`` before they normalise it must not run, or None.

    Under autocast a batch norm may read float32, of images say: values around 100 would lose in bfloat16 what sets them apart.
    """
    if x.dtype.itemsize <= dtype.itemsize or transform.mean is None:
        return None
    return f"an input in {x.dtype} that is normalised for a convolution in {dtype}"
