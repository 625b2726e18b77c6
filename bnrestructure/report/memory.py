"""What a training step costs in memory: what autograd keeps for the backward pass, and the peak of the whole step."""

from __future__ import annotations

import resource
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["peak_memory", "saved_for_backward"]


def saved_for_backward(model: nn.Module, step: Callable[[], Any]) -> int:
    """The most bytes of tensors that autograd holds at one time for the backward pass while ``step()`` runs.

    A storage is counted once however many tensors over it are saved, and whole even if a slice of it is saved: that is
    what cannot be freed. The model's parameters and buffers are not counted, they exist anyway. ``step`` may be a
    forward pass alone or a whole training step; what activation checkpointing avoids or repeats is seen as it happens.
    """
    own = {_storage_key(t) for t in (*model.parameters(), *model.buffers())}
    saved = _SavedStorages(own)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, _unpack):
        step()
    return saved.peak


class _Held:
    """A saved tensor, in an object that dies when autograd lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(held: _Held) -> Tensor:
    return held.tensor


class _SavedStorages:
    """How many live saved tensors lie over each storage, and the bytes of all those storages."""

    def __init__(self, excluded: set[tuple[torch.device, int]]) -> None:
        self.excluded = excluded
        self.peak = 0
        self._bytes = 0
        self._counts: Counter[tuple[torch.device, int]] = Counter()

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        key, size = _storage_key(tensor), tensor.untyped_storage().nbytes()
        if key not in self.excluded:
            self._counts[key] += 1
            if self._counts[key] == 1:
                self._bytes += size
                self.peak = max(self.peak, self._bytes)
            weakref.finalize(held, self._release, key, size).atexit = False
        return held

    def _release(self, key: tuple[torch.device, int], size: int) -> None:
        self._counts[key] -= 1
        if not self._counts[key]:
            self._bytes -= size


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def peak_memory(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """How many bytes the process grows at most while ``step()`` runs, over what it held before.

    On a GPU this is what PyTorch's allocator reports. On the CPU it is resident memory, everything included (scratch of
    the convolutions, captured graphs, the allocator's own waste), and it is only meaningful in a process that has not
    run a step before: freed memory that the allocator kept would be used again unseen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _peak_resident()
    step()
    return _peak_resident() - before


def _peak_resident() -> int:
    """The process's largest resident size so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
