"""Regions: the submodules that capture can follow, their rewritten programs, and the check that a program still fits."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from bnrestructure.capture.program import Program
from bnrestructure.capture.state import ModuleState
from bnrestructure.capture.tracer import Arguments, capture, is_capturing
from bnrestructure.core.errors import CaptureError
from bnrestructure.graph.boundaries import any_global_hooks, boundary_reason, is_library_leaf
from bnrestructure.passes import pipeline
from bnrestructure.passes.prepare import prepare
from bnrestructure.passes.restore_formats import RESTORE_FORMATS

__all__ = ["Options", "Region", "captured", "has_batch_norm", "rewritten", "subregions"]

_CACHED_PROGRAMS = 8


@dataclass(frozen=True)
class Options:
    """How a model is to be restructured."""

    backend: str = "auto"
    passes: tuple[str, ...] = pipeline.PASSES
    fuel: int | None = None


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any batch norm layer is in this module tree, or code that calls the function."""
    kinds = {type(m) for m in module.modules()}
    return any(issubclass(kind, nn.modules.batchnorm._BatchNorm) or _calls_batch_norm(kind) for kind in kinds)  # type: ignore[arg-type]


@cache
def _calls_batch_norm(cls: type[nn.Module]) -> bool:
    """Whether a method that this class does not have from torch.nn names ``batch_norm``, as F.batch_norm(...) does."""
    own = [vars(c) for c in cls.__mro__ if issubclass(c, nn.Module) and not c.__module__.startswith("torch.nn")]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for methods in own for f in methods.values() if callable(f)]
    while codes:
        code = codes.pop()
        if code is not None and "batch_norm" in code.co_names:
            return True
        codes += [c for c in code.co_consts if inspect.iscode(c)] if code is not None else []
    return False


def captured(module: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> tuple[fx.GraphModule, dict[nn.Module, str]]:
    """The captured graph, made ready for patterns: out-of-place, views that are only read as reshapes, nn.Identity gone."""
    gm, opaque = capture(module, forward, arguments)
    prepare(gm)
    return gm, opaque


def rewritten(
    module: nn.Module, forward: Callable[..., Any], arguments: Arguments, options: Options
) -> tuple[fx.GraphModule, dict[nn.Module, str]]:
    """The captured graph after the passes of ``options``, and the submodules that stayed calls with why."""
    gm, opaque = captured(module, forward, arguments)
    pipeline.rewrite(gm, options.passes, options.backend, options.fuel)
    return gm, opaque


def subregions(module: nn.Module, opaque: dict[nn.Module, str]) -> Iterator[tuple[nn.Module, str]]:
    """Submodules that the graph of ``module`` calls as they are and that hold batch norms of their own, with why they are calls."""
    for child in module.children():
        if is_library_leaf(child):
            continue
        reason = opaque.get(child) or boundary_reason(child)
        if reason is None:
            yield from subregions(child, opaque)
        elif has_batch_norm(child):
            yield child, reason


@dataclass
class _Cached:
    key: Any
    state: ModuleState
    program: Program | None


@dataclass
class Region:
    """What a swapped module carries: its options and its programs, one per structure of call and state of the module tree.

    ``refusals`` are the reasons of calls that ran the module's own forward.
    """

    options: Options
    refusals: list[str] = field(default_factory=list)
    on_opaque: Callable[[nn.Module, Options], None] | None = None
    _programs: list[_Cached] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """A copied model starts without programs: they are made again from its own modules."""
        return Region(self.options, on_opaque=self.on_opaque)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Region, (self.options, [], self.on_opaque))

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the module: its rewritten program, or ``forward``, its own, where no program fits."""
        if not module.training or is_capturing() or any_global_hooks() or _is_transformed():
            return forward(module, *args, **kwargs)
        if getattr(module, "_is_replica", False):
            self._refuse("nn.DataParallel runs replicas of the module, whose tensors are not parameters: DistributedDataParallel's are")
            return forward(module, *args, **kwargs)
        try:
            arguments = Arguments(args, kwargs)
        except CaptureError as error:
            self._refuse(str(error))
            return forward(module, *args, **kwargs)
        program = self._program(module, forward, arguments)
        if program is None:
            return forward(module, *args, **kwargs)
        return program(module, arguments.tensors)

    def _program(self, module: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> Program | None:
        key = (arguments.key, torch.is_grad_enabled())
        with self._lock:
            for i, cached in enumerate(self._programs):
                if cached.key == key and cached.state.matches():
                    if i:
                        self._programs.insert(0, self._programs.pop(i))
                    return cached.program
            program = self._make(module, forward, arguments)
            self._programs.insert(0, _Cached(key, ModuleState(module), program))
            del self._programs[_CACHED_PROGRAMS:]
            return program

    def _make(self, module: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> Program | None:
        try:
            gm, opaque = rewritten(module, forward, arguments, self.options)
        except CaptureError as error:
            self._refuse(str(error))
            inner = [child for child in module.children() if has_batch_norm(child)]
            program = None
        else:
            inner = [child for child, _ in subregions(module, opaque)]
            RESTORE_FORMATS.rewrite(gm)
            program = Program(gm, type(module).__name__)
        if self.on_opaque is not None:
            for child in inner:
                self.on_opaque(child, self.options)
        return program

    def _refuse(self, reason: str) -> None:
        if reason not in self.refusals:
            self.refusals.append(reason)


def _is_transformed() -> bool:
    """Inside torch.func transforms, forward-mode AD or torch.jit.trace the module's own forward runs: fused nodes are reverse-mode only."""
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0
