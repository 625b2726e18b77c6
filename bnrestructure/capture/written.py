"""What parts of a model write when they are called: a forward around them that reads it would read what was there before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from bnrestructure.capture.reach import reach_of_part
from bnrestructure.capture.reads import Reads
from bnrestructure.capture.side_effects import Attributes
from bnrestructure.capture.surroundings import surroundings_of

__all__ = ["Written", "keeping_buffers_of_scripts"]

_TENSORS = ("_parameters", "_buffers")


class Written:
    """Attributes, parameters and buffers of modules, and variables, that other code than the captured forward gave other values.

    variables   (identity of where it is, name): see :meth:`bnrestructure.capture.side_effects.Around.written`
    """

    def __init__(self) -> None:
        self.variables: set[tuple[int, str]] = set()
        self._names: dict[nn.Module, set[str]] = {}
        self._objects: dict[int, Any] = {}  # by identity

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

    def note_reach(self, part: nn.Module) -> None:
        """Note what a part's code may write outside of it by a way round: on modules that it can get hold of, by methods that it keeps."""
        reach = reach_of_part(part)
        for module in reach.modules - set(part.modules()):
            self._names.setdefault(module, set()).update(reach.stored)
        self._objects |= reach.bound

    def read_by(self, reads: Reads, followed: Iterable[nn.Module]) -> str | None:
        """One of them that the forward reads, which is made of those of the modules ``followed``; or None."""
        attribute = next((name for m, names in self._names.items() for name in sorted(names & reads.outside(m))), None)
        if attribute is None and self._objects:
            held = ((name, m.__dict__.get(name)) for m, names in reads.names_outside.items() for name in sorted(names))
            attribute = next((name for name, value in held if id(value) in self._objects), None)
        if attribute is not None or not self.variables:
            return attribute
        around = surroundings_of(followed, kept=True)
        named = {(id(v.home), v.name) for v in around.variables} | {(id(m.home), name) for m in around.missing for name in m.names}
        return next((name for _, name in sorted(named & self.variables)), None)


@contextmanager
def keeping_buffers_of_scripts(module: nn.Module, unseen: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Put back what ScriptModules write to their buffers: compiled code finds them by itself, so that no fake ones can stand for them."""
    scripts = [m for m in module.modules() if isinstance(m, torch.jit.ScriptModule)]
    with unseen(), torch.no_grad():
        kept = [(b, b.clone()) for m in scripts for b in m.buffers()]
    try:
        yield
    finally:
        with unseen(), torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
