"""Which bytes each program of a launch reads and which it writes, noted by Triton's interpreter; and programs in any order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter

from bnrestructure.kernels.cuda import launch as launching

__all__ = ["LaunchSets", "shuffled", "watched"]


@dataclass
class LaunchSets:
    """Of one launch, by program (its place in the grid): arrays of the addresses of single bytes.

    ``arguments`` are kept so that no later tensor gets the memory of one: it would seem to have been written in part.
    """

    kernel: str
    arguments: tuple[Any, ...] = ()
    reads: dict[tuple[int, int, int], list[np.ndarray]] = field(default_factory=dict)
    writes: dict[tuple[int, int, int], list[np.ndarray]] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """What two programs do that depends on their order."""
        written = {place: _union(arrays) for place, arrays in self.writes.items()}
        everything = np.concatenate([*written.values(), np.empty(0, np.uint64)])
        found = []
        if len(np.unique(everything)) != len(everything):
            found.append(f"{self.kernel}: two programs write the same byte")
        owners = {int(address): place for place, addresses in written.items() for address in addresses}
        for place, arrays in self.reads.items():
            read = _union(arrays)
            shared = read[np.isin(read, everything)]
            if any(owners[int(address)] != place for address in shared):
                found.append(f"{self.kernel}: {place} reads what another program writes")
                break
        return found

    @property
    def written(self) -> np.ndarray:
        """All bytes that are written."""
        return np.concatenate([_union(arrays) for arrays in self.writes.values()])


def _union(arrays: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(arrays)) if arrays else np.empty(0, np.uint64)


def _bytes(pointers: Any, mask: Any) -> np.ndarray:
    size = pointers.get_element_ty().primitive_bitwidth // 8
    inside = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
    return (pointers.data[inside].astype(np.uint64)[:, None] + np.arange(size, dtype=np.uint64)).reshape(-1)


@contextmanager
def watched() -> Iterator[list[LaunchSets]]:
    """The launches that are made meanwhile, in order."""
    found: list[LaunchSets] = []
    builder = interpreter.InterpreterBuilder
    load, store, launch = builder.create_masked_load, builder.create_masked_store, launching.launch

    def noting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found[-1].reads.setdefault(tuple(self.grid_idx), []).append(_bytes(pointers, mask))
        return load(self, pointers, mask, *rest)

    def noting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found[-1].writes.setdefault(tuple(self.grid_idx), []).append(_bytes(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    run = interpreter.GridExecutor.__call__

    def noting_run(self: Any, *arguments: Any, **constants: Any) -> Any:
        found.append(LaunchSets(self.fn.__name__, arguments))
        return run(self, *arguments, **constants)

    assert launch is launching.launch
    with (
        mock.patch.object(builder, "create_masked_load", noting_load),
        mock.patch.object(builder, "create_masked_store", noting_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", noting_run),
    ):
        yield found


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Programs run in a random order: each place in the grid stands for another one."""
    builder = interpreter.InterpreterBuilder
    place, extent = builder.set_grid_idx, builder.set_grid_dim
    order: dict[tuple[int, ...], tuple[int, ...]] = {}

    def set_extent(self: Any, x: int, y: int, z: int) -> None:
        places = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        order.clear()
        order.update(zip(places, (places[i] for i in np.random.default_rng(seed).permutation(len(places))), strict=True))
        extent(self, x, y, z)

    def set_place(self: Any, *at: int) -> None:
        place(self, *order[at])

    with mock.patch.object(builder, "set_grid_dim", set_extent), mock.patch.object(builder, "set_grid_idx", set_place):
        yield
