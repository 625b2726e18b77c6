"""Memory as a program sees it: tensors in global memory, and a block's shared memory, in which too early an access is told."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from emulator.state import Array, Fault

__all__ = ["GlobalMemory", "Region", "SharedMemory"]

#: Where the first tensor lies, and how far the next one is from the end of the last, in bytes.
_FIRST, _APART = 0x7F0000000000, 1 << 20


@dataclass
class Region:
    """One tensor: ``rows`` of ``width`` bytes, ``pitch`` bytes apart, kept without what lies between. Accesses are noted by byte."""

    address: int
    data: Array
    pitch: int
    width: int
    written: Array
    read: Array

    @property
    def size(self) -> int:
        """Bytes from the first to the last."""
        return (len(self.data) // self.width - 1) * self.pitch + self.width


@dataclass
class GlobalMemory:
    """All tensors that a launch was given. What lies between them must not be touched."""

    regions: list[Region] = field(default_factory=list)

    def add(self, data: Array, pitch: int | None = None, width: int | None = None, offset: int = 0) -> Region:
        """Room for ``data`` (bytes, row by row), aligned to 256 bytes but for ``offset``. The region's data is written to in place."""
        width = len(data) if width is None else width
        end = _FIRST if not self.regions else self.regions[-1].address + self.regions[-1].size
        address = -(-(end + _APART) // 256) * 256 + offset
        region = Region(address, data, pitch or width, width, np.zeros(len(data), bool), np.zeros(len(data), bool))
        self.regions.append(region)
        return region

    def find(self, addresses: Array, size: int) -> list[tuple[Region, Array, Array]]:
        """(region, which of ``addresses``, [those, size] positions in its data). Raises Fault for what is misaligned or nobody's."""
        if (addresses % np.uint64(size)).any():
            address = int(addresses[(addresses % np.uint64(size)) > 0][0])
            raise Fault(f"an access of {size} bytes at {address:#x}, which is not aligned to that")
        starts = np.array([region.address for region in self.regions], dtype=np.uint64)
        owner = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        found = []
        for number in np.unique(owner):
            which = np.flatnonzero(owner == number)
            region = self.regions[number] if number >= 0 else None
            distance = addresses[which].astype(np.int64) - (region.address if region else 0)
            row, column = np.divmod(distance, region.pitch) if region else (distance, distance)
            if region is None or (distance + size > region.size).any() or (column + size > region.width).any():
                raise Fault(f"an access outside every tensor, at {int(addresses[which][0]):#x}")
            found.append((region, which, (row * region.width + column)[:, None] + np.arange(size)))
        return found

    def load(self, addresses: Array, size: int) -> Array:
        """[addresses, size] bytes."""
        result = np.empty((len(addresses), size), np.uint8)
        for region, which, at in self.find(addresses, size):
            region.read[at] = True
            result[which] = region.data[at]
        return result

    def store(self, addresses: Array, values: Array) -> None:
        """``values`` are [addresses, size] bytes."""
        for region, which, at in self.find(addresses, values.shape[1]):
            region.written[at] = True
            region.data[at] = values[which]


class SharedMemory:
    """A block's shared memory by byte, with who touched it since the last barrier.

    Two accesses of one byte by different warps, one of them a write, need a barrier between them. What a copy brings may be read once its
    group was waited for; what an asynchronous product reads may be overwritten once that was. What ordinary stores wrote a product may
    read behind a proxy fence.
    """

    def __init__(self, size: int, warps: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.epoch = 1
        self._writer = np.full(size, -1, np.int16)
        self._written = np.zeros(size, np.int32)
        self._read = np.zeros((warps, size), np.int32)
        self._copying = np.zeros(size, bool)
        self._multiplied = np.zeros(size, np.int16)
        self._unfenced = np.zeros(size, bool)

    def barrier(self) -> None:
        """All warps have arrived."""
        self.epoch += 1

    def positions(self, addresses: Array, size: int) -> Array:
        """[addresses, size] bytes. Raises Fault for what is misaligned or outside."""
        at = addresses.astype(np.int64)
        if (at % size).any():
            raise Fault(f"an access of {size} bytes to shared memory at {int(at[at % size > 0][0]):#x}, which is not aligned to that")
        if len(at) and (at.min() < 0 or at.max() + size > len(self.bytes)):
            raise Fault(f"an access to shared memory at {int(at.max()):#x} of {len(self.bytes):#x}")
        found: Array = at[:, None] + np.arange(size)
        return found

    def load(self, at: Array, warp: Array) -> Array:
        """The bytes at [threads, size] ``at``, read by threads of ``warp``."""
        self._check_read(at, warp[:, None])
        self._read[np.broadcast_to(warp[:, None], at.shape), at] = self.epoch
        return self.bytes[at]

    def _check_read(self, at: Array, warp: Array) -> None:
        if self._copying[at].any():
            raise Fault("shared memory is read before the copy that fills it was waited for")
        if ((self._written[at] == self.epoch) & (self._writer[at] != warp)).any():
            raise Fault("shared memory is read without a barrier behind another warp's write")

    def store(self, at: Array, values: Array, warp: Array) -> None:
        """Ordinary stores."""
        self._check_write(at, warp)
        self.bytes[at] = values
        self._unfenced[at] = True
        self._note_write(at, warp)

    def _note_write(self, at: Array, warp: Array) -> None:
        self._written[at] = self.epoch
        self._writer[at] = np.broadcast_to(warp[:, None], at.shape)

    def _check_write(self, at: Array, warp: Array) -> None:
        if self._copying[at].any():
            raise Fault("shared memory is written while a copy fills it")
        if self._multiplied[at].any():
            raise Fault("shared memory is written while a product may read it")
        others = warp[:, None]
        if ((self._written[at] == self.epoch) & (self._writer[at] != others)).any():
            raise Fault("shared memory is written without a barrier behind another warp's write")
        recent = self._read[:, at] == self.epoch
        recent[warp, np.arange(len(warp))] = False
        if recent.any():
            raise Fault("shared memory is written without a barrier behind another warp's read")

    def begin_copy(self, at: Array, warp: Array) -> None:
        """A copy to ``at`` is under way."""
        self._check_write(at, warp)
        self._copying[at] = True
        self.bytes[at] = 0xFF

    def end_copy(self, at: Array, values: Array, warp: Array) -> None:
        """The copy was waited for by the threads that began it."""
        self._copying[at] = False
        self.bytes[at] = values
        self._unfenced[at] = False
        self._note_write(at, warp)

    def fence(self, warps: Array) -> None:
        """What these warps wrote the product units may see."""
        self._unfenced[np.isin(self._writer, warps)] = False

    def begin_product(self, at: Array, warps: Array) -> Array:
        """The bytes that a product of these warps begins to read."""
        for warp in warps:
            self._check_read(at, warp)
        if self._unfenced[at].any():
            raise Fault("a product reads shared memory without a proxy fence behind ordinary stores")
        self._multiplied[at] += 1  # no byte is there twice
        return self.bytes[at]

    def end_product(self, at: Array, warps: Array) -> None:
        """The product is done, and these warps know it."""
        self._multiplied[at] -= 1
        for warp in warps:
            self._read[warp, at] = self.epoch
