"""What parts of a model write when they are called: a forward around them that reads it would read what was there before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bnrestructure.capture.reads import Reads
from bnrestructure.capture.side_effects import Attributes

__all__ = ["Written"]

_TENSORS = ("_parameters", "_buffers")


class Written:
    """Attributes, parameters and buffers of modules, by name, that other code than the captured forward gave other values."""

    def __init__(self) -> None:
        self._names: dict[nn.Module, set[str]] = {}

    @contextmanager
    def noting(self, root: nn.Module, of: nn.Module | None = None) -> Iterator[None]:
        """Undo what is written to this module tree within the block, and note what it was; ``of`` is the tree that it is a copy of."""
        originals = dict(zip(root.modules(), root.modules() if of is None else of.modules(), strict=True))
        modules = [m for m in originals if not isinstance(m, torch.jit.ScriptModule)]
        attributes = Attributes(root)
        tensors = [(m, m.__dict__[kind], name, t) for m in modules for kind in _TENSORS for name, t in m.__dict__[kind].items()]
        try:
            yield
        finally:
            replaced = [(m, values, name, t) for m, values, name, t in tensors if values.get(name) is not t]
            written = [(m, name) for m, name in attributes.restore() if name not in _TENSORS]
            for _, values, name, t in replaced:
                values[name] = t
            for m, name in [*written, *((m, name) for m, _, name, _ in replaced)]:
                self._names.setdefault(originals[m], set()).add(name)

    def read_by(self, reads: Reads) -> str | None:
        """One of them that the forward reads, or None."""
        return next((name for m, names in self._names.items() for name in sorted(names & reads.outside(m))), None)
