"""Totals of what tiles have summed: a convolution's input gradient and its weight gradient both end with some, and one launch makes two.

Nothing here is atomic: the same input gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrestructure.core.constants import constant
from bnrestructure.kernels.cuda import tiles
from bnrestructure.kernels.cuda.launch import launch
from bnrestructure.kernels.hybrid import weight_gradient

__all__ = ["Sums", "totals"]


@triton.jit
def _add_up(partial_ptr, out_ptr, program, count, inner, FACTOR: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    blocks = tl.cdiv(inner, BC)
    outer = program // blocks
    column = (program - outer * blocks) * BC + tl.arange(0, BC)
    valid = column < inner
    total = tl.zeros((BC,), dtype=tl.float32)
    for start in range(0, count, BT):
        tile = start + tl.arange(0, BT)
        place = partial_ptr + (tile.to(tl.int64)[:, None] + outer * count) * inner + column[None, :]
        total += tl.sum(tl.load(place, mask=(tile < count)[:, None] & valid[None, :], other=0.0).to(tl.float32), 0)
    if FACTOR != 1.0:
        total *= FACTOR
    tl.store(out_ptr + outer * inner + column, total, mask=valid)


@triton.jit(do_not_specialize=("a_programs", "a_count", "b_count"))
def _sums_kernel(
    a_ptr, a_out_ptr, b_ptr, b_out_ptr, a_programs, a_count, a_inner, b_count, b_inner,
    A_FACTOR: tl.constexpr, A_BT: tl.constexpr, A_BC: tl.constexpr, B_FACTOR: tl.constexpr, B_BT: tl.constexpr, B_BC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < a_programs:
        _add_up(a_ptr, a_out_ptr, program, a_count, a_inner, A_FACTOR, A_BT, A_BC)
    else:
        _add_up(b_ptr, b_out_ptr, program - a_programs, b_count, b_inner, B_FACTOR, B_BT, B_BC)


class _Due(NamedTuple):
    """``partial`` [outer, count, inner], contiguous; the sums over the middle go to ``out``, contiguous, [outer, inner], fp32.

    Where the middle is one tile, what goes there is ``factor`` times it.
    """

    partial: Tensor
    out: Tensor
    factor: float = 1.0


class Sums:
    """Sums that are due. What the methods return has its values once :meth:`finish` was called."""

    def __init__(self) -> None:
        self._due: list[_Due] = []

    def of(self, partial: Tensor) -> Tensor:
        """[outer, inner] of ``partial`` [outer, count, inner], both fp32."""
        outer, _, inner = partial.shape
        out = torch.empty(outer, inner, dtype=partial.dtype, device=partial.device)
        self._add(partial, out)
        return out

    def weight_gradient(self, partial: Tensor, weight: Tensor) -> Tensor:
        """The sum of ``partial`` [splits, C_out, KH, KW, C_in / groups] in the weight's shape, dtype and memory format."""
        gradient = torch.empty_like(weight)
        flat = gradient.permute(0, 2, 3, 1)
        if weight.dtype != partial.dtype:
            flat.copy_(partial.sum(0))
        elif flat.is_contiguous():
            self._add(partial.view(1, partial.shape[0], -1), flat.view(1, -1))
        else:
            torch.sum(partial, 0, out=flat)
        return gradient

    def restored(self, found: Tensor, weight: Tensor, factor: float) -> Tensor:
        """A weight's gradient ``found``, ``factor`` times too large, in the weight's dtype and memory format."""
        alike = all(w.permute(0, 2, 3, 1).is_contiguous() for w in (found, weight))
        if not alike or weight.dtype is not torch.float32 or found.dtype is torch.float32:
            return weight_gradient(found, weight, factor)
        gradient = torch.empty_like(weight)
        flat, given = gradient.permute(0, 2, 3, 1), found.permute(0, 2, 3, 1)
        self._due.append(_Due(given.view(1, 1, -1), flat.view(1, -1), 1 / factor))
        return gradient

    def finish(self) -> None:
        """Make them, two by one launch."""
        while len(self._due) > 1:
            a, b = self._due.pop(), self._due.pop()
            (a_outer, a_count, a_inner), (b_outer, b_count, b_inner) = a.partial.shape, b.partial.shape
            a_tile, b_tile = tiles.sums(a_count, a_inner), tiles.sums(b_count, b_inner)
            a_programs = a_outer * tiles.cdiv(a_inner, a_tile.channels)
            launch(
                _sums_kernel, (a_programs + b_outer * tiles.cdiv(b_inner, b_tile.channels),),
                a.partial, a.out, b.partial, b.out, a_programs, a_count, a_inner, b_count, b_inner,
                A_FACTOR=a.factor, A_BT=a_tile.rows, A_BC=a_tile.channels, B_FACTOR=b.factor, B_BT=b_tile.rows, B_BC=b_tile.channels,
                warps=a_tile.warps,
            )  # fmt: skip
        for partial, out, factor in self._due:
            if partial.shape[1] == 1:
                torch.mul(partial[:, 0], constant(factor, out.device), out=out)
            else:
                torch.sum(partial, 1, out=out)
        self._due.clear()

    def _add(self, partial: Tensor, out: Tensor) -> None:
        """Make it due, unless one program would take too long: PyTorch's sum has several for one total."""
        if partial.shape[1] <= tiles.READ_BY_ONE:
            self._due.append(_Due(partial, out))
        else:
            torch.sum(partial, 1, out=out)


def totals(partial: Tensor, sums: Sums | None) -> Tensor:
    """[planes, C] of ``partial`` [planes, tiles, C]: now, or due in ``sums``."""
    return partial.sum(1) if sums is None else sums.of(partial)
