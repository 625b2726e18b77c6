"""Modules whose tensors are fake ones for a moment, so that their own code can run without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnrestructure.capture.written import Written
from bnrestructure.graph.boundaries import is_library_leaf

__all__ = ["without_data"]


@contextmanager
def without_data(module: nn.Module, double_of: Callable[[Tensor], Tensor], written: Written) -> Iterator[nn.Module]:
    """What to call for a module, its tensors being fake ones meanwhile; what it writes to its attributes is noted, and not written.

    For a layer it is a double: another thread may look at the layer itself. A ScriptModule holds its tensors elsewhere.
    """
    if is_library_leaf(module) and not module._modules and not isinstance(module, torch.jit.ScriptModule):
        yield _double(module, double_of)
        return
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for m in module.modules():
            if isinstance(m, torch.jit.ScriptModule):
                continue
            places: tuple[dict[str, Any], ...] = (m._parameters, m._buffers, m.__dict__)
            for values in places:
                for name, value in list(values.items()):
                    if isinstance(value, Tensor):
                        changed.append((values, name, value))
                        values[name] = double_of(value)
        with written.noting(module):
            yield module
    finally:
        for values, name, value in reversed(changed):
            values[name] = value


def _double(layer: nn.Module, double_of: Callable[[Tensor], Tensor]) -> nn.Module:
    double: nn.Module = object.__new__(type(layer))
    state = layer.__dict__
    tensors = {name: double_of(value) for name, value in state.items() if isinstance(value, Tensor)}
    double.__dict__.update(state, **tensors)
    for kind in ("_parameters", "_buffers"):
        double.__dict__[kind] = {name: None if value is None else double_of(value) for name, value in state[kind].items()}
    return double
