"""Which part of a launch's work a program does. Neighbours share the sectors of memory, or the rows, that they read."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["tile_and_channels", "tile_and_group"]


@triton.jit
def tile_and_channels(channels, BC: tl.constexpr):
    """(tile of rows, its BC channels) of a program on a grid of (tiles * cdiv(channels, BC),), in this order."""
    channel_tiles = tl.cdiv(channels, BC)
    return tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles * BC + tl.arange(0, BC)


@triton.jit
def tile_and_group(column_tiles, GROUPS: tl.constexpr):
    """(tile of rows, group) of a program on a grid of (tiles * GROUPS * column_tiles, 1), in this order.

    Groups stand side by side, since narrow ones share the very sectors of memory that their pixels lie in. A single group is taken from the
    grid's other dimension: where Triton 3.6 knows that it is 0 the code comes out with spilled registers on sm_80.
    """
    if GROUPS > 1:
        tile = tl.program_id(0) // (column_tiles * GROUPS)
        group = tl.program_id(0) // column_tiles % GROUPS
    else:
        tile = tl.program_id(0) // column_tiles
        group = tl.program_id(1)
    return tile, group
