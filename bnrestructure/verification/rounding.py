"""How far a computation goes when nothing but its rounding changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["INSIDE", "RandomRounding"]

#: How many roundings the result of an operation is moved by, at most.
INSIDE = 16.0


class RandomRounding(TorchDispatchMode):
    """Rounds every operation's float64 results at random: each element is multiplied by 1 + 16 * eps * u, u uniform in [-1, 1].

    Monte Carlo arithmetic (Parker, 1997): runs with different seeds spread as the results of different orders of rounding do. An
    operation is rounded inside as well, where nothing can be changed from here: a sum of n products n times, which makes about the root
    of n. 16 stands for that, the root of a small convolution's 256.
    Operations that write in place or return views make no new value, or one that was rounded before. Other dtypes are left alone:
    what is drawn in them, a loss's cotangents say, is data.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if all(r.alias_info is None for r in func._schema.returns):
            given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for t in pytree.tree_leaves(result):
                if isinstance(t, Tensor) and t.dtype is torch.float64 and t.untyped_storage().data_ptr() not in given:
                    self._round(t)
        return result

    def _round(self, t: Tensor) -> None:
        if t.device not in self._generators:
            self._generators[t.device] = torch.Generator(t.device).manual_seed(self._seed)
        u = torch.rand(t.shape, generator=self._generators[t.device], dtype=t.dtype, device=t.device)
        t.mul_((u * 2 - 1) * (INSIDE * torch.finfo(t.dtype).eps) + 1)
