"""Running in float64 models that were written for float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["everything_in"]


class _Float32IsFloat64(TorchFunctionMode):
    """``x.float()``, ``x.to(torch.float32)`` and kin give float64: no rounding on the way to the truth."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = pytree.tree_map_only(torch.dtype, _wide, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else dtype


@contextmanager
def everything_in(dtype: torch.dtype) -> Iterator[None]:
    """For float64: tensors that a forward() makes, or casts to float32, are float64 too. For other dtypes: nothing."""
    if dtype != torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float32IsFloat64():
            yield
    finally:
        torch.set_default_dtype(before)
