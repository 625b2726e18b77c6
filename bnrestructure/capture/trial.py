"""Parts of a model that read the values of tensors: fake tensors have none, so a copy of the part runs once on random numbers.

What such a part returns may differ from call to call. Its tensors' sizes decide nothing in the forward around it (:class:`SizeLog` sees to
that), and :class:`AsBefore` holds each later result against the one that was captured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from bnrestructure.capture.reach import reach_of_part
from bnrestructure.capture.spelling import VALUES
from bnrestructure.capture.written import Written
from bnrestructure.core.errors import CaptureError, first_line
from bnrestructure.core.generators import preserved_generators

__all__ = ["AsBefore", "trial"]


def trial(module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], written: Written) -> Any:
    """What a copy of the module returns for random tensors like these fake ones, on their device. Nothing else is written, nor drawn; what
    the copy writes is noted.

    Raises CaptureError where it raises any error, or returns anything but tensors.
    """
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with unset_fake_temporarily(), torch.no_grad(), preserved_generators(of=(*given, *module.parameters())):
        try:
            args, kwargs = pytree.tree_map_only(Tensor, _like, (args, kwargs))
            taken = [(t, t.clone()) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            # A ScriptModule has nothing but buffers to write to, and those are the caller's to put back.
            double = module if isinstance(module, torch.jit.ScriptModule) else copy.deepcopy(module)
            with written.noting(double, of=module), _keeping_tensors(module):
                result = double.forward(*args, **kwargs)
        except Exception as error:  # whatever user code raises on numbers that mean nothing
            raise CaptureError(f"{VALUES} ({path}: {first_line(error)})") from error
        changed = not all(torch.equal(tensor, before) for tensor, before in taken)
    if changed:
        raise CaptureError(f"{path} changes a tensor in place that it is given")
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
        raise CaptureError(f"{VALUES} ({path}, which returns more than tensors)")
    return result


@contextmanager
def _keeping_tensors(module: nn.Module) -> Iterator[None]:
    """Put back the parameters and buffers that a part can get hold of: a copy's callbacks are the part's own, and write to what it has."""
    modules = {*module.modules(), *reach_of_part(module).modules}
    tensors = {id(t): t for m in modules for values in (m._parameters, m._buffers) for t in values.values() if t is not None}
    kept = [(t, t.clone()) for t in tensors.values() if not is_lazy(t)]
    try:
        yield
    finally:
        for t, before in kept:
            if not torch.equal(t, before):
                t.data.copy_(before)


def _like(fake: Tensor) -> Tensor:
    """A tensor of a fake one's shape, strides, dtype and device: uniform between 0 and 1, or zeros where it holds no real numbers."""
    real = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    return real.uniform_() if real.is_floating_point() else real.zero_()


class AsBefore:
    """Hands on what a part of a model returned, if it is of the kind that was captured, as a function that a graph can call: where the kind
    may follow from values, or from what a hook returns.

    The kind is the nest of containers and each tensor's dtype and number of dimensions.
    """

    def __init__(self, path: str, result: Any) -> None:
        self._path, self._kind = path, _kind(result)
        self.__name__ = self.__qualname__ = "as_before"
        self.__module__ = "bnrestructure.capture"

    def __call__(self, result: Any) -> Any:
        if _kind(result) != self._kind:
            raise RuntimeError(
                f"{self._path} returned {_shown(result)}, and something else when the model was captured: what its result is follows "
                "from the values of a tensor, or from a hook. Call bnrestructure.unrestructure on the model, and restructure its parts"
            )
        return result


def _kind(result: Any) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten(result)
    return spec, tuple((leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _shown(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of {result.dim()} dimensions in {str(result.dtype).removeprefix('torch.')}"
    return f"a {type(result).__name__}"
