"""What a captured graph calls that is no function of PyTorch's: constants of the user's code, and custom autograd Functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Constant", "CustomFunction"]


class Constant:
    """A tensor that is no attribute of the module tree (a global, one in a list), as a function that a graph can call."""

    def __init__(self, value: Tensor, name: str) -> None:
        self.value = value
        self.__name__ = self.__qualname__ = name
        self.__module__ = "bnrestructure.capture"

    def __call__(self) -> Tensor:
        return self.value


class CustomFunction:
    """A custom autograd Function as a function that a graph can call: it is not looked into, and keeps its own backward."""

    def __init__(self, cls: type[torch.autograd.Function]) -> None:
        self._cls = cls
        self.__name__ = self.__qualname__ = cls.__name__
        self.__module__ = "bnrestructure.capture"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._cls.apply(*args, **kwargs)
