"""``type(x)`` in a forward that is captured: a tensor is a torch.Tensor, a size an int, and a module of the class that its author wrote,
whatever stands for it.

Python asks nobody what ``type`` returns. So the modules whose code names it get another one among their globals meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from bnrestructure.capture.sizes import TracedSize, is_traced

__all__ = ["telling_kinds"]

_NAME = "type"


def _kind_of(value: Any) -> type:
    if is_traced(value):
        return type(value.value)
    kind = type(value)
    if issubclass(kind, TracedSize):
        return torch.Size
    if issubclass(kind, FakeTensor):
        return nn.Parameter if isinstance(value, nn.Parameter) else torch.Tensor
    original: type | None = vars(kind).get("_bnr_original")  # of a restructured module (capture/swap.py)
    return kind if original is None else original


@contextmanager
def telling_kinds(homes: Iterable[dict[str, Any]], is_captured: Callable[[], bool]) -> Iterator[None]:
    """Within the block ``type`` in these globals tells the truth about what stands for something, in a thread that captures."""

    class AsItWas(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            told = len(args) == 1 and not kwargs and is_captured()
            return _kind_of(args[0]) if told else type(*args, **kwargs)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, type)

        def __subclasscheck__(cls, kind: Any) -> bool:
            return issubclass(kind, type)

    stand_in = AsItWas(_NAME, (type,), {})
    changed = [home for home in homes if _NAME not in home]
    for home in changed:
        home[_NAME] = stand_in
    try:
        yield
    finally:
        for home in changed:
            if home.get(_NAME) is stand_in:
                del home[_NAME]
