"""A block while it runs: its registers, its memories, what is under way, and what was counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bnrestructure.kernels.cuda.machine_code.sass import Instruction
from emulator.memory import GlobalMemory, SharedMemory
from emulator.state import Array, State

__all__ = ["STACK", "Block", "Product"]

#: Where a thread's stack begins, which grows downwards, in bytes.
STACK = 4096


@dataclass(eq=False)
class Product:
    """An asynchronous product of a warp group: what it reads of shared memory, and how to finish it."""

    warps: Array
    shared: list[Array]
    finish: Callable[[], None]
    group: int | None = None


@dataclass(eq=False)
class Block:
    """One block of a launch. ``counting``: whether accesses are counted, which takes time.

    ``executed``: by instruction index, how many warps issued it, all turns together;
    ``sectors``: 32-byte sectors of global memory that each request touched; ``wavefronts``: passes that shared memory needs for its banks.
    """

    state: State
    memory: GlobalMemory
    shared: SharedMemory
    counting: bool = False
    executed: Counter[int] = field(default_factory=Counter)
    sectors: Counter[int] = field(default_factory=Counter)
    wavefronts: Counter[int] = field(default_factory=Counter)
    products: list[Product] = field(default_factory=list)
    local: Array = field(init=False)
    _copies: dict[int, list[list[tuple[Array, Array]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.local = np.zeros((STACK // 2, self.state.threads), np.uint32)

    def warps_of(self, mask: Array | None) -> Array:
        """Numbers of the warps with a thread in the mask."""
        return np.arange(self.state.warps) if mask is None else np.unique(self.state.warp[mask])

    # --- copies: of each warp a list of committed groups, the last one still open ---

    def begin_copy(self, at: Array, values: Array, warp: Array) -> None:
        """Bytes on their way to positions ``at`` of shared memory."""
        self.shared.begin_copy(at, warp)
        for number in np.unique(warp):
            mine = warp == number
            self._groups(int(number))[-1].append((at[mine], values[mine]))

    def commit_copies(self, warps: Array) -> None:
        """What was begun so far is a group."""
        for warp in warps:
            self._groups(int(warp)).append([])

    def wait_for_copies(self, warps: Array, allowed: int) -> None:
        """All but the ``allowed`` newest groups have arrived."""
        for warp in warps:
            groups = self._groups(int(warp))
            while len(groups) - 1 > allowed:
                for at, values in groups.pop(0):
                    self.shared.end_copy(at, values, np.full(len(at), warp))

    def _groups(self, warp: int) -> list[list[tuple[Array, Array]]]:
        return self._copies.setdefault(warp, [[]])

    # --- products: a group is closed by its last one ---

    def begin_product(self, product: Product, closes: bool) -> None:
        """Note a product that is under way."""
        self.products.append(product)
        if closes:
            number = 1 + max((p.group for p in self.products if p.group is not None), default=0)
            for open_one in self.products:
                if open_one.group is None and (open_one.warps == product.warps).all():
                    open_one.group = number

    def wait_for_products(self, warps: Array, allowed: int) -> None:
        """All but the ``allowed`` newest groups of these warps are done."""
        for warp in warps:
            mine = [p for p in self.products if warp == p.warps[0] and p.group is not None]
            kept = sorted({p.group for p in mine if p.group is not None})[::-1][:allowed]
            for product in mine:
                if product.group not in kept:
                    product.finish()
                    for at in product.shared:
                        self.shared.end_product(at, product.warps)
                    self.products.remove(product)

    # --- counts ---

    def count_access(self, instruction: Instruction, addresses: Array, threads: Array, size: int) -> None:
        """Note what an access takes of memory: by warp, sectors of 32 bytes of global memory, or passes over the 32 banks of shared."""
        if not self.counting or not len(addresses):
            return
        per_warp = 32 if instruction.opcode not in ("LDSM", "STSM") else 8 * (len(threads) // (8 * self.state.warps))
        warp = threads // per_warp
        if instruction.opcode in ("LDG", "STG", "LDGSTS"):
            sector = addresses >> np.uint64(5)
            self.sectors[instruction.index] += len(np.unique(np.stack([warp.astype(np.uint64), sector]), axis=1).T)
            return
        # A pass serves 128 bytes: a quarter of the warp's threads at 16 bytes each, half of them at 8, all at 4 and less.
        served = max(1, min(32, 128 // size))
        turn = threads % per_warp // served
        word = addresses.astype(np.int64)[:, None] // 4 + np.arange(max(1, size // 4))
        keys = np.stack([np.broadcast_to((warp * 32 + turn)[:, None], word.shape).reshape(-1), word.reshape(-1) % 32, word.reshape(-1)])
        distinct = np.unique(keys, axis=1)  # the same word is served to all that ask for it
        _, crowd = np.unique(distinct[:2], axis=1, return_counts=True)
        group = np.unique(distinct[:2], axis=1)[0]
        self.wavefronts[instruction.index] += sum(int(crowd[group == g].max()) for g in np.unique(group))
