"""Random numbers for comparing runs: the same for every dtype and memory format, and none taken from the user."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnrestructure.verification.convolutions import own_convolution

__all__ = ["SameDraws", "seeded"]


def seeded(seed: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


class SameDraws(TorchDispatchMode):
    """Makes dropout and kin draw the same numbers whatever the dtype and memory format of their tensors.

    PyTorch fills memory in order, so that a dropout mask depends on the layout, and draws of another dtype may differ.
    Here every operation that draws is run on contiguous float64 tensors and its result is copied to where it was
    wanted. Some convolutions take another way here, too (verification/convolutions.py).
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            own = own_convolution(func, args)
            return func(*args, **kwargs) if own is None else own
        if kwargs.get("dtype") is not None and kwargs["dtype"].is_floating_point:
            drawn = func(*args, **(kwargs | {"dtype": torch.float64}))
            return pytree.tree_map_only(Tensor, lambda t: t.to(kwargs["dtype"]), drawn)
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is None or not target.is_floating_point():
            return func(*args, **kwargs)
        wide_args, wide_kwargs = pytree.tree_map_only(Tensor, _widened, (args, kwargs))
        drawn = func(*wide_args, **wide_kwargs)
        if func._schema.name.endswith("_"):
            return target.copy_(drawn)
        return pytree.tree_map_only(Tensor, lambda t: t.to(target.dtype) if t.is_floating_point() else t, drawn)


def _widened(t: Tensor) -> Tensor:
    return t.to(torch.float64, memory_format=torch.contiguous_format, copy=True) if t.is_floating_point() else t
