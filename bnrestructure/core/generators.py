"""The generators of random numbers that a process has, and putting them back to where they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["preserved_generators"]


@contextmanager
def preserved_generators(of: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Put every global generator (torch's on all devices, Python's, NumPy's) back to where it was.

    ``of`` some tensors: of the devices, only those that the tensors are on. Others need not even be set up.
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if of is None else sorted({t.device.index for t in of if t.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
