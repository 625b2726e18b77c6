"""A device with graphs for want of one: a tape of ATen calls, which is played without the Python that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Tape"]

T = TypeVar("T")
Entry = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Tape:
    """Records as a CUDA graph does: nothing has happened afterwards, and each repetition writes to the memory of the results.

    ``spoil`` gets each recording's entries, and returns those that are played.
    """

    def __init__(self, spoil: Callable[[list[Entry]], list[Entry]] | None = None) -> None:
        self.spoil = spoil
        self.played = 0

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        state = torch.random.get_rng_state()
        log = _Log()
        with log:
            found = work()
        torch.random.set_rng_state(state)
        for tensor, value in log.before:
            tensor.data.copy_(value)
        entries = log.entries if self.spoil is None else self.spoil(log.entries)
        return found, lambda: self._play(entries)

    def is_recording(self) -> bool:
        return False

    def stream(self) -> int:
        return 0

    def _play(self, entries: list[Entry]) -> None:
        self.played += 1
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in entries:
                found = function(*args, **kwargs)
                if not function._schema.is_mutable:
                    for own, new in zip(pytree.tree_leaves(results), pytree.tree_leaves(found), strict=True):
                        if isinstance(own, Tensor):
                            own.data.copy_(new)


class _Log(TorchDispatchMode):
    """The calls that compute something, and what tensors from outside were before these changed them."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self._made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        schema = function._schema
        for argument, value in zip(schema.arguments, args, strict=False):
            changed = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in pytree.tree_leaves(value) if changed else ():
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._made:
                    self.before.append((tensor, tensor.detach().clone()))
        found = function(*args, **kwargs)
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if not is_view:
            self._made |= {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(found) if isinstance(t, Tensor)}
            if "empty" not in schema.name:
                self.entries.append((function, args, kwargs, found))
        return found
