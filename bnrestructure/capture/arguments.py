"""The structure of a call: which leaves of its arguments are tensors, and what a captured graph takes for granted of them."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from bnrestructure.core.errors import CaptureError
from bnrestructure.core.memory_format import is_channels_last

__all__ = ["Arguments"]

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, slice, range, enum.Enum,
    torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_STAND_INS = (fx.Proxy, FakeTensor, FunctionalTensor)


class Arguments:
    """One call's (args, kwargs), taken apart.

    key          equal for calls that share a graph, unless sizes decided something in it (capture/sizes.py)
    structure    the key without the constants: which leaves are tensors, and what Python code can ask of each that no batch changes

    Raises CaptureError for leaves that are neither constants, plain tensors, nor stand-ins for tensors, and for tensors with attributes
    that are no constants.
    """

    key: tuple[Any, ...] = ()
    structure: tuple[Any, ...] = ()

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.is_tensor = tuple([isinstance(leaf, Tensor) for leaf in leaves])
        #: Whether something among them stands for a tensor and has no data: on the meta device, a fake tensor, a proxy of torch.fx.
        self.without_data = any(isinstance(leaf, _STAND_INS) or (isinstance(leaf, Tensor) and leaf.is_meta) for leaf in leaves)
        first = {id(t): i for i, t in reversed(list(enumerate(self.tensors)))}
        #: For each tensor the first place in which the very same one was given.
        self.places = tuple([first[id(t)] for t in self.tensors])
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, fx.Proxy, *_CONSTANTS)):
                raise CaptureError(f"an argument of type {type(leaf).__name__} is neither a tensor nor a plain constant")
            if isinstance(leaf, Tensor) and type(leaf) not in _PLAIN and not isinstance(leaf, _STAND_INS):
                raise CaptureError(f"an argument is of type {type(leaf).__name__}, a subclass of torch.Tensor")
        if self.without_data:
            return
        constants = tuple([_hashable(c) for c in self.constants])
        self.structure = (self.is_tensor, self.spec, self.places, tuple([_facts(t) for t in self.tensors]))
        self.key = (constants, self.structure)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Sizes and strides of the tensors."""
        return tuple((t.shape, t.stride()) for t in self.tensors)

    def unflatten(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with ``tensors`` in the places of the tensor leaves."""
        given = iter(tensors)
        leaves = [next(given) if t else c for t, c in zip(self.is_tensor, self.constants, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


def _facts(t: Tensor) -> tuple[Any, ...]:
    return type(t), t.dim(), t.dtype, t.device, t.requires_grad, t.is_neg(), _layout(t), _attributes(t)


def _attributes(t: Tensor) -> Any:
    """What somebody has put on a tensor, which a forward may ask for."""
    own = t.__dict__
    if not own:
        return None
    if not all(isinstance(value, _CONSTANTS) for value in own.values()):
        raise CaptureError("an argument is a tensor with attributes of its own, which are no plain constants")
    return tuple([(name, _hashable(value)) for name, value in sorted(own.items())])


def _layout(t: Tensor) -> Any:
    """Equal for tensors that eager operations lay their results out alike for."""
    if t.layout is not torch.strided:
        return t.layout
    if t.is_contiguous():
        return "contiguous"
    if is_channels_last(t):
        return "channels_last"
    return tuple(sorted(range(t.dim()), key=t.stride, reverse=True))


def _hashable(constant: Any) -> Any:
    if isinstance(constant, slice):  # equal slices are no keys before Python 3.12
        return slice, constant.start, constant.stop, constant.step
    return type(constant), constant, repr(constant) if constant == 0 else None  # 0.0 is no -0.0

